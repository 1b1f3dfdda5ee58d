"""Threshold-choice: causal while it trains, and as busy as its capacities say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from mor.model.decision import boundary
from mor.model.modeling_mor import MorForCausalLM
from mor.model.threshold_choice import ThresholdChoiceRouter
from tests.tiny import KV_CACHES, left_padding, random_ids, tiny_model


def model_and_router(**choices: Any) -> tuple[MorForCausalLM, ThresholdChoiceRouter]:
    """A model in training mode whose thresholds have moved once."""
    model = tiny_model(router="threshold_choice", **choices).train()
    router = model.model.recursion.router
    assert isinstance(router, ThresholdChoiceRouter)
    return model, router


def untrained(**choices: Any) -> tuple[MorForCausalLM, ThresholdChoiceRouter]:
    """A model in training mode that has seen nothing yet."""
    model, router = model_and_router(**choices)
    router.running_thresholds.fill_(-math.inf)
    router.threshold_updates.zero_()
    return model, router


def shares(depths_BT: Tensor) -> list[float]:
    return [float((depths_BT > recursion).double().mean()) for recursion in range(3)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_cache", KV_CACHES)
@torch.no_grad()
def test_later_tokens_change_no_earlier_decision_in_training(kv_cache: str, documents: bool) -> None:
    """Rows of a batch do not meet either. Expert-choice, in training, is caught by the same probe."""
    document_ids = (torch.arange(32) // 12).expand(4, 32) if documents else None
    for router in ("threshold_choice", "expert_choice"):
        model, ids = tiny_model(router=router, kv_cache=kv_cache).train(), random_ids(4, 32)
        before = model(ids, document_ids=document_ids)
        changes, moved = 0, 0.0
        for cut in range(1, 32, 3):
            other = ids.clone()
            other[0, cut:] = random_ids(1, 32, seed=cut)[0, cut:]
            other[1:] = random_ids(3, 32, seed=cut + 99)
            after = model(other, document_ids=document_ids)
            changes += int((after.depths[0, :cut] != before.depths[0, :cut]).sum())
            moved = max(moved, float((after.logits[0, :cut] - before.logits[0, :cut]).abs().max()))
        assert (changes == 0 and moved < 1e-4) == (router == "threshold_choice")
        assert len(before.depths.unique()) > 1


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("capacities", [None, [0.8, 0.5, 0.2]], ids=str)
def test_training_computes_what_evaluation_computes(kv_cache: str, capacities: list[float] | None) -> None:
    """Sets in rounded sizes, and in their own: values, depths and gradients."""
    model, _ = model_and_router(kv_cache=kv_cache, capacities=capacities, causal_method="none")
    ids, mask = random_ids(3, 80), left_padding(0, 11, 70, size=80)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for decision in (None, "causal"):
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=labels, decision=decision)
        output.loss.backward()
        found.append((output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (trained, gradients), (plain, expected) = found
    evaluated = model.eval()(ids, attention_mask=mask, use_cache=False)
    for other in (plain, evaluated):
        assert torch.equal(trained.depths, other.depths)
        torch.testing.assert_close(trained.logits, other.logits, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("capacities", [[1, 2 / 3, 1 / 3], [0.9, 0.5, 0.2], [1.0, 1.0, 0.1]], ids=str)
@torch.no_grad()
def test_thresholds_follow_the_capacities_over_batches_but_not_in_every_row(capacities: list[float]) -> None:
    model, _ = untrained(capacities=capacities, threshold_decay=0.9)
    seen = []
    for step in range(40):
        depths = model(random_ids(16, 64, seed=step)).depths
        model.update_router_bias()
        seen.append(depths)
    assert shares(seen[0]) == [1, 1, 1]
    assert shares(torch.cat(seen[20:])) == pytest.approx(capacities, abs=0.01)
    assert len((seen[-1] == 3).sum(1).unique()) > 1
    model.eval()
    assert shares(model(random_ids(64, 64, seed=99)).depths) == pytest.approx(capacities, abs=0.03)
    assert (
        float((model(random_ids(2, 64), decision="top_k").depths > 2).double().mean()) == int(capacities[2] * 64) / 64
    )


def test_a_step_moves_the_thresholds_once_and_by_all_its_forwards() -> None:
    """t_n is the mean of the steps' boundaries, each weighing 0.6 of the next, and a step's that of its forwards."""
    model, router = untrained(threshold_decay=0.6, num_recursions=2, sharing="cycle")
    found = []
    for step in range(3):
        boundaries = []
        before = router.running_thresholds.clone()
        for part in random_ids(8, 20, seed=step).split(2):
            trace = model(part).routing[1]
            assert torch.equal(router.running_thresholds, before)
            assert torch.equal(trace.kept_BA & trace.valid_BA, (trace.logits_BA >= before[1]) & trace.valid_BA)
            boundaries.append(boundary(trace.logits_BA.detach(), trace.valid_BA, 20))
        model.update_router_bias()
        found.append(float(torch.stack(boundaries).mean()))
        weights = [0.6 ** (step - number) for number in range(step + 1)]
        expected = sum(w * b for w, b in zip(weights, found, strict=True)) / sum(weights)
        assert float(router.running_thresholds[1]) == pytest.approx(expected, abs=1e-6)
    assert router.boundary_sum.tolist() == [[0, 0], [0, 0]]
    model.update_router_bias()
    assert float(router.running_thresholds[1]) == pytest.approx(expected, abs=1e-6)


def test_who_is_kept_out_everywhere_leaves_weights_with_gradients_and_later_thresholds_alone() -> None:
    """Processes that train together need gradients of the same weights, whatever their tokens do."""
    for threshold, tokens in ((9.0, 0), (-9.0, 2 * 70)):
        model, router = model_and_router(router_architecture="mlp")
        router.running_thresholds.copy_(torch.tensor([0.0, threshold, -0.5]))
        ids = random_ids(2, 70)
        output = model(ids, labels=ids)
        assert int((output.depths > 1).sum()) == tokens
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        model.update_router_bias()
        assert (float(router.running_thresholds[2]) == -0.5) == (tokens == 0)
        assert router.threshold_updates.tolist() == [1, 2, 1 + (tokens > 0)]


def test_gates_carry_the_gradient_to_the_scores() -> None:
    model, _ = model_and_router(causal_method="none")
    ids = random_ids(4, 40)
    model(ids, labels=ids).losses["lm"].backward()
    for head in model.model.recursion.router.heads:
        assert float(head[0].weight.grad.norm()) > 1e-4


@torch.no_grad()
def test_padding_moves_no_threshold() -> None:
    ids = random_ids(2, 24)
    padded_ids = torch.cat([torch.zeros(2, 9, dtype=torch.long), ids], dim=1)
    found = []
    for given_ids, mask in ((ids, None), (padded_ids, left_padding(9, 9, size=33)), (ids, left_padding(0, 8, size=24))):
        model, router = model_and_router()
        model(given_ids, attention_mask=mask)
        model.update_router_bias()
        found.append(router.running_thresholds)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@torch.no_grad()
def test_a_capacity_warm_up_lowers_the_shares_along_its_cosine() -> None:
    model, _ = untrained(capacity_warmup_steps=40)
    found, expected = [], []
    for step in range(60):
        found.append(shares(model(random_ids(16, 64, seed=step)).depths)[2])
        model.update_router_bias()
        expected.append(1 / 3 + 2 / 3 * 0.5 * (1 + math.cos(math.pi * min(1, step / 40))))
    for start in range(0, 60, 10):
        window = slice(start, start + 10)
        assert sum(found[window]) / 10 == pytest.approx(sum(expected[window]) / 10, abs=0.07), start


@torch.no_grad()
def test_a_saved_model_decides_by_the_thresholds_of_its_training(tmp_path: Any) -> None:
    model, router = untrained()
    for step in range(5):
        model(random_ids(8, 32, seed=step))
        model.update_router_bias()
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = loaded.model.recursion.router
    for name in ("running_thresholds", "threshold_updates", "training_forwards"):
        assert torch.equal(getattr(found, name), getattr(router, name))
    ids = random_ids(3, 30)
    assert torch.equal(loaded(ids).depths, model(ids).depths)
    assert found.rule("causal").thresholds.tolist() == [-math.inf, *router.running_thresholds[1:].tolist()]
    assert len(loaded(ids).depths.unique()) == 3


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), max_size=12), st.floats(0, 14))
def test_a_boundary_lets_as_many_through_as_were_asked(scores: list[tuple[int, bool]], asked: float) -> None:
    score = torch.tensor([[float(score) for score, _ in scores]])
    valid = torch.tensor([[real for _, real in scores]], dtype=torch.bool)
    real = sorted((score for score, is_real in scores if is_real), reverse=True)
    size = min(len(real), round(asked))
    for given_size in (asked, torch.tensor(asked)):
        found = float(boundary(score, valid, given_size))
        through = sum(score >= found for score in real)
        ties = sum(score == real[size - 1] for score in real) if size else 0
        assert size <= through <= size + max(0, ties - 1)
        assert real or found == 0
    if valid.all() and len(scores):
        assert float(boundary(score, None, asked)) == found
