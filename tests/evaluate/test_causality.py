"""The suffix probe passes causal rules and catches those that look ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.evaluate.causality import ProbeResult, _changed_suffixes, suffix_probe
from tests.evaluate.models import calibrated, model, rows

TEXT = rows(1, 24)


@pytest.mark.parametrize(
    "router", ["vanilla", "none", "expert_choice", "threshold_choice", "token_choice", "random", "gate"]
)
def test_causal_rules_pass(router: str) -> None:
    result = suffix_probe(model(router), TEXT, num_suffixes=200)
    assert result.causal
    assert result.num_suffixes == 200
    assert result.max_change < 1e-4
    assert result.max_depth_change == 0
    assert str(result) == "causal: none of 200 changed suffixes moved an earlier prediction"


@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
def test_causal_rules_pass_with_every_cache(kv_cache: str) -> None:
    assert suffix_probe(model(kv_cache=kv_cache), TEXT, num_suffixes=100).causal


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "token_choice"])
def test_budgets_are_causal(router: str) -> None:
    assert suffix_probe(calibrated(router), TEXT, mean_depth=1.7, num_suffixes=100).causal


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "random"])
def test_top_k_is_caught(router: str) -> None:
    result = suffix_probe(model(router), TEXT, decision="top_k", num_suffixes=200)
    if router == "random":  # its scores ignore the tokens, so only the length of a row could leak
        assert result.causal
        return
    assert not result.causal
    assert result.num_changed > 20
    assert result.max_depth_change >= 1
    assert result.max_change > 0.01
    assert str(result).startswith("not causal: ")


def test_a_model_that_looks_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("vanilla")
    forward = built.forward

    def leaking(input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(input_ids, **options)
        output.logits = output.logits + 1e-3 * input_ids[:, -1:, None]
        return output

    monkeypatch.setattr(built, "forward", leaking)
    result = suffix_probe(built, TEXT, num_suffixes=50)
    assert result.num_changed == 50 - sum_of_unchanged_ends(built.config.vocab_size, 50)
    assert result.max_depth_change == 0


def sum_of_unchanged_ends(vocabulary: int, count: int) -> int:
    changed, _ = _changed_suffixes(TEXT[0], 32, vocabulary, generator := torch.Generator().manual_seed(0))
    rest, _ = _changed_suffixes(TEXT[0], count - 32, vocabulary, generator)
    return int((torch.cat([changed, rest])[:, -1] == TEXT[0, -1]).sum())


def test_the_mode_and_the_random_state_are_left_alone() -> None:
    built = model().train()
    before = torch.random.get_rng_state()
    suffix_probe(built, TEXT, num_suffixes=4)
    assert built.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_suffixes_differ_at_the_cut_and_not_before() -> None:
    changed, cuts = _changed_suffixes(TEXT[0], 100, 32, torch.Generator().manual_seed(0))
    for row, cut in zip(changed, cuts.tolist(), strict=True):
        assert 1 <= cut < 24
        assert torch.equal(row[:cut], TEXT[0, :cut])
        assert row[cut] != TEXT[0, cut]


def test_one_row_of_two_tokens_is_the_least() -> None:
    for bad in (torch.zeros(2, 5, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 3)):
        with pytest.raises(ValueError, match="expected one row"):
            suffix_probe(model("vanilla"), bad)


def test_result_is_causal_when_nothing_changed() -> None:
    result = ProbeResult(
        decision="causal", num_suffixes=3, num_changed=0, max_change=1e-7, max_depth_change=0, tolerance=1e-5
    )
    assert result.causal
