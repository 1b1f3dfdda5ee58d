"""Arms by name: their configurations, and depths of random models that are like a trained router's."""

from __future__ import annotations

import pytest
import torch

from mor.benchmark.arms import arm_config, build_arm, dimensions, layers_for, vanilla_twin, word_tokenizer
from mor.recipes import paper_sizes, recipe


def test_dimensions_and_layers_are_those_of_the_recipes() -> None:
    for size in paper_sizes().values():
        for recursions, layers in size.recursive_layers.items():
            assert layers_for(size.num_layers, recursions) == layers
    ours, run = arm_config("mor-4", "360m").to_dict(), recipe("360m-mor-4").model
    assert {key: ours[key] for key in run if not key.startswith("router_")} == {
        key: value for key, value in run.items() if not key.startswith("router_")
    }
    assert dimensions("135m")["hidden_size"] == 576


def test_names_say_what_an_arm_is() -> None:
    assert arm_config("vanilla", "360m").num_hidden_layers == 32
    assert arm_config("vanilla-4", "360m").num_hidden_layers == 34
    token = arm_config("mor-3-token-hybrid", "tiny")
    assert (token.router, token.kv_cache, token.num_recursions) == ("token_choice", "hybrid", 3)
    assert arm_config("recursive-2-shared", "tiny").router == "none"
    assert arm_config("mor-3", "tiny", routing="random", mean_depth=1.5).router == "random"
    assert vanilla_twin(token).num_hidden_layers == token.num_hidden_layers
    assert vanilla_twin(token).num_recursions == 1


@pytest.mark.parametrize("name", ["mor", "mor-1", "vanilla-3-shared", "recursive-3-token", "more-3", "mor-3-fast"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"arm '{name}' is unknown; write vanilla"):
        arm_config(name, "tiny")


def test_wrong_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions 'huge' are unknown; choose one of tiny, small, 135m"):
        arm_config("vanilla", "huge")


@pytest.mark.parametrize(("name", "routing"), [("mor-3", "calibrated"), ("mor-3", "random"), ("mor-3-token", "random")])
@pytest.mark.parametrize("mean_depth", [1.7, 2.3])
def test_depths_are_spent_as_asked(name: str, routing: str, mean_depth: float) -> None:
    arm = build_arm(name, "tiny", mean_depth=mean_depth, routing=routing)  # type: ignore[arg-type]
    rows = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        depths = arm.model(rows, mean_depth=arm.mean_depth).depths
    assert float(depths.double().mean()) == pytest.approx(mean_depth, abs=0.2)
    assert ("random: a hash" in arm.routing) == (name == "mor-3" and routing == "random")


def test_every_token_has_a_text() -> None:
    tokenizer = word_tokenizer(300)
    assert tokenizer.decode([0, 299]) == "w0 w299"
