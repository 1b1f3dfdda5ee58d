"""Source layers of the shared block, against what the authors' code chose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mor.convert.initialization import INITIALIZATIONS, kept_layers, layer_sources
from mor.model.depth_plan import SHARINGS
from tests.golden.files import initialization_cases


def named(case: dict[str, Any]) -> str:
    return f"{case['L']}-{case['num_recursion']}-{case['sharing']}-{case['init']}"


def test_there_are_240_cases() -> None:
    assert len({named(case) for case in initialization_cases()}) == 240


@pytest.mark.parametrize("case", initialization_cases(), ids=named)
def test_sources_are_those_of_the_authors(case: dict[str, Any]) -> None:
    chosen = layer_sources(
        case["L"],
        num_recursions=case["num_recursion"],
        sharing=case["sharing"],
        initialization=case["init"],
        seed=case["numpy_seed"] or 0,
    )
    groups = [step.weight for step in chosen.plan.steps]
    assert list(chosen.kept) == case["self_attn_layer_idx"]
    assert groups == case["share_group"]
    # Layer i held the constant i, so the value found after sharing is the mean of its sources.
    assert [np.mean(chosen.sources[group]) for group in groups] == pytest.approx(case["init_value"], abs=1e-4)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_one_recursion_keeps_every_layer(sharing: Any, initialization: Any) -> None:
    chosen = layer_sources(7, num_recursions=1, sharing=sharing, initialization=initialization)
    assert chosen.sources == tuple((layer,) for layer in range(7))


def test_random_depends_on_the_seed_and_leaves_the_global_generator_alone() -> None:
    def draw(seed: int) -> Any:
        return layer_sources(32, num_recursions=3, sharing="middle_cycle", initialization="random", seed=seed).sources

    np.random.seed(5)  # noqa: NPY002  (the generator in question)
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    assert draw(1) == draw(1) != draw(2)
    assert np.random.random() == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("num_layers", "num_recursions", "sharing"),
    [(8, 9, "cycle"), (8, 7, "middle_cycle"), (2, 1, "middle_sequence"), (8, 0, "cycle")],
)
def test_too_few_layers(num_layers: int, num_recursions: int, sharing: Any) -> None:
    with pytest.raises(ValueError, match=f"num_recursions={num_recursions}"):
        kept_layers(num_layers, num_recursions=num_recursions, sharing=sharing)


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match="initialization='steps' is unknown; choose one of stepwise"):
        layer_sources(8, num_recursions=2, sharing="cycle", initialization="steps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sharing='loop' is unknown"):
        layer_sources(8, num_recursions=2, sharing="loop")  # type: ignore[arg-type]
