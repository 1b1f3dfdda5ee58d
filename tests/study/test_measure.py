"""What measuring a finished model takes, and that it finds the same however rows are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.evaluate.perplexity import QualityTally
from mor.evaluate.text import HeldOut
from mor.model.backbone import MorModel
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import score_tokens
from mor.study import measure
from mor.study.grid import Measurement
from mor.study.measure import measure_model
from tests.evaluate.models import VOCABULARY, calibrated, model, rows

BYTES = torch.arange(VOCABULARY) % 3 + 1
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every forward."""
    seen, forward = list[int](), MorModel.forward

    def counted(self: MorModel, **arguments: Any) -> Any:
        seen.append(len(arguments["input_ids"]))
        return forward(self, **arguments)

    monkeypatch.setattr(MorModel, "forward", counted)
    return seen


def held_out() -> HeldOut:
    text = rows(24, 32)
    number = torch.arange(text.numel()).view_as(text) // 50
    domains = torch.zeros(int(number.max()) + 1, dtype=torch.int64)
    return HeldOut(rows_NT=text, document_NT=number, domain_D=domains, domains=("text",))


def measured(built: MorForCausalLM) -> dict[str, Any]:
    return measure_model(built, held_out(), BYTES, Measurement(tokens=768, dial_tokens=384))


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("expert_choice", [24, 24] + [12] * 11 + [24] + [12] * 3 + [33]),  # own, dial, fixed, scaling, probe
        ("token_choice", [24] + [12] * 11 + [24, 33]),
        ("none", [24] + [12] * 6 + [33]),
        ("vanilla", [24, 33]),
    ],
)
def test_a_forward_takes_all_rows_that_fit(router: str, expected: list[int], forwards: list[int]) -> None:
    built = calibrated(router, **SHAPE) if router.endswith("choice") else model(router, **SHAPE)
    forwards.clear()
    measured(built)
    assert forwards == expected


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "token_choice", "none"])
def test_batches_of_any_size_measure_the_same(
    router: str, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = calibrated(router, **SHAPE) if router.endswith("choice") else model(router, **SHAPE)
    forwards.clear()
    together, few = measured(built), len(forwards)
    monkeypatch.setattr(measure, "rows_at_once", lambda *_: 5)
    apart = measured(built)
    assert len(forwards) - few > 2 * few - 3
    assert_alike(together, apart)


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    else:
        assert found == expected


def test_scores_of_a_batch_are_summed_without_waiting_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built, waits = calibrated("expert_choice"), list[str]()
    scores, bytes_BT = score_tokens(built, rows(4, 32)), BYTES[rows(4, 32)]
    for name in ("tolist", "cpu", "__int__", "__float__", "__bool__", "item", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, name=name: waits.append(name))
    tally = QualityTally(num_recursions=3)
    for _ in range(2):
        tally.add(scores, bytes_BT)
    assert waits == []
    monkeypatch.undo()
    once = QualityTally(num_recursions=3)
    once.add(scores, bytes_BT)
    twice, one = (each.quality("causal", None, built.config) for each in (tally, once))
    assert (twice.num_tokens, twice.nll) == (2 * one.num_tokens, pytest.approx(one.nll))
    assert twice.flops_per_token == pytest.approx(one.flops_per_token)
    assert twice.kv_bytes_per_token == pytest.approx(one.kv_bytes_per_token)
