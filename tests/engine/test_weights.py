"""Engines on a model's own weights: what becomes of the model, and what they see of it afterwards."""

from __future__ import annotations

import pytest
import torch

from tests.engine.workload import engine_of, greedy
from tests.tiny import random_ids, tiny_model


def test_the_model_can_be_trained_on_afterwards() -> None:
    model, twin = (tiny_model(router="expert_choice").train() for _ in range(2))
    engine_of(model).generate([[1, 2, 3]], greedy(3), progress=False)
    for each in (model, twin):
        ids = random_ids(2, 9)
        each.train()(input_ids=ids, labels=ids).loss.backward()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=0, rtol=0)


def test_engines_of_one_model_share_its_weights() -> None:
    """What changes in place is seen by all of them, and none has a copy."""
    model = tiny_model(router="expert_choice", attention_bias=True, mlp_bias=True)
    engines = [engine_of(model, prefix_caching=False) for _ in range(2)]

    def outputs() -> list[list[int]]:
        return [list(engine.generate([[1, 2, 3]], greedy(9), progress=False)[0].token_ids) for engine in engines]

    before = outputs()
    size = model.model.recursion.block[0].self_attn.q_proj.weight.untyped_storage().nbytes()
    with torch.no_grad():
        for weight in model.parameters():
            weight.neg_().add_(0.05)
    after = outputs()
    engines.append(engine_of(model))
    assert outputs() == [after[0]] * 3 != [before[0]] * 3
    assert model.model.recursion.block[0].self_attn.q_proj.weight.untyped_storage().nbytes() == size


@pytest.mark.parametrize("kinds", [[torch.bfloat16], [torch.float64, torch.float32]])
def test_refuses_requests_once_the_weights_are_replaced(kinds: list[torch.dtype]) -> None:
    model = tiny_model(router="expert_choice")
    engine = engine_of(model, native=None)
    engine.generate([[1, 2]], greedy(2), progress=False)
    for kind in kinds:
        model.to(kind)
    with pytest.raises(ValueError, match=f"{kinds[-1]} on cpu, are no longer those .* build another engine"):
        engine.add_request("late", [1, 2], greedy(2))
    assert not engine.has_unfinished
    assert engine_of(model).generate([[1, 2]], greedy(2), progress=False)[0].finish_reason == "length"
