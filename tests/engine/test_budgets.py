"""One rule for rows with budgets of their own decides for each row as its own rule would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine.budgets import Budget, Budgets
from mor.engine.params import MOST_BUDGETS, SamplingParams
from mor.model.calibrate import calibrate
from mor.model.decision import Threshold
from mor.model.expert_choice import FixedDepths
from mor.model.token_choice import DepthRule
from tests.engine.workload import engine_of
from tests.tiny import random_ids, tiny_model

MANY: list[Budget] = [(None, None), (1.0, None), (1.3, None), (2.2, None), (3.0, None), (2.2, 2), (None, 1)]


def budgets_of(calibrated: bool = True, **changes: Any) -> Budgets:
    model = tiny_model(**changes)
    if calibrated:
        calibrate(model, [random_ids(4, 32)], mean_depths=[1, 1.5, 2, 2.5, 3])
    return Budgets(model.model.recursion.router, model.config.depth_plan)


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "random"])
def test_thresholds_stand_in_the_order_of_rows(router: str) -> None:
    budgets = budgets_of(router=router)
    together = budgets.rule([*MANY, MANY[1]])
    assert isinstance(together, Threshold) and together.thresholds.shape == (8, 3)
    alone = [budgets.rule([budget]) for budget in [*MANY, MANY[1]]]
    assert [rule.thresholds.tolist() for rule in alone] == together.thresholds.tolist()  # type: ignore[attr-defined]
    score_BA = torch.linspace(-1, 1, 8)[:, None]
    for recursion in range(3):
        kept = together.choose(recursion, score_BA, None, 1).mask((8, 1), score_BA.device)
        each = [rule.choose(recursion, score_BA[row : row + 1], None, 1) for row, rule in enumerate(alone)]
        assert kept.flatten().tolist() == [bool(tokens.mask((1, 1), score_BA.device)) for tokens in each]


def test_depths_are_chosen_in_the_order_of_rows() -> None:
    budgets = budgets_of(router="token_choice")
    together = budgets.rule(MANY)
    assert isinstance(together, DepthRule)
    score_BTR = torch.rand(len(MANY), 1, 3)
    alone = [budgets.rule([budget]).depth(score_BTR[row : row + 1], None) for row, budget in enumerate(MANY)]  # type: ignore[attr-defined]
    assert together.depth(score_BTR, None).flatten().tolist() == [int(depth) for depth in alone]


def test_rows_of_one_budget_share_one_rule() -> None:
    budgets = budgets_of(router="expert_choice")
    rule = budgets.rule([(1.5, None)] * 4)
    assert isinstance(rule, Threshold) and rule.thresholds.shape == (3,)
    assert budgets.rule([(1.5, None)]) is rule


def test_of_however_many_budgets_few_are_kept() -> None:
    model = tiny_model(router="expert_choice")
    calibrate(model, [random_ids(4, 32)], mean_depths=[1, 2, 3])
    engine = engine_of(model, slots=True)
    prompts = [[1, 2]] * (MOST_BUDGETS + 50)
    params = [SamplingParams(max_tokens=2, mean_depth=1 + number / 1000) for number in range(len(prompts))]
    engine.generate(prompts, params, progress=False)
    kept = engine.runner.budgets._rules, engine.slots._thresholds, engine.prefixes._roots  # type: ignore[union-attr]
    assert all(len(each) <= MOST_BUDGETS for each in kept)


@pytest.mark.parametrize("mean_depth", [None, 1.0, 2.2, 3.0])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_token_choice_takes_the_best_depth_within_its_limit(mean_depth: float | None, most: int) -> None:
    """Where all tokens were to go deeper, they go as deep as they may."""
    budgets = budgets_of(router="token_choice")
    score_BTR = torch.rand(50, 1, 3)
    free = budgets.rule([(mean_depth, None)])
    limited = budgets.rule([(mean_depth, most)])
    assert isinstance(free, DepthRule) and isinstance(limited, DepthRule)
    biased = score_BTR if free.bias is None else score_BTR + free.bias
    within = biased[..., :most]
    expected = within.argmax(-1) if bool(within.isfinite().any()) else torch.full((50, 1), most - 1)
    assert torch.equal(limited.depth(score_BTR, None), expected)


def test_limits() -> None:
    budgets = budgets_of(calibrated=False, router="fixed")
    assert [budgets.limit((None, most)) for most in (None, 1, 3)] == [3, 1, 3]
    assert isinstance(budgets.rule([(None, 1), (None, None)]), FixedDepths)


@pytest.mark.parametrize(
    ("model", "budget", "message"),
    [
        (dict(router="expert_choice"), (None, 0), "max_recursions=0 must be between 1 and the model's 3"),
        (dict(router="expert_choice"), (None, 4), "max_recursions=4 must be between 1 and the model's 3"),
        (dict(), (None, 2), "max_recursions=2 must be between 1 and the model's 1"),
        (dict(router="none", sharing="middle_sequence"), (None, 2), "max_recursions=2 needs whole-block recursions"),
        (dict(router="none", sharing="cycle"), (1.5, None), "mean_depth=1.5 needs a router"),
        (dict(router="gate"), (1.5, None), "mean_depth=1.5: router='gate' has a fixed depth"),
        (dict(router="token_choice"), (1.5, None), "mean_depth=1.5 needs a calibrated model"),
    ],
)
def test_what_a_model_cannot_do(model: dict[str, Any], budget: Budget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budgets_of(calibrated=False, **model).check(budget)


@pytest.mark.parametrize("mean_depth", [0.9, 3.1])
def test_depths_out_of_reach(mean_depth: float) -> None:
    with pytest.raises(ValueError, match=f"mean_depth={mean_depth} is impossible: this model can do 1.000 to 3.000"):
        budgets_of(router="expert_choice").check((mean_depth, None))


def test_what_a_model_can_do() -> None:
    budgets = budgets_of(router="expert_choice")
    for budget in MANY:
        budgets.check(budget)
        assert 1 <= budgets.limit(budget) <= 3
    budgets_of(calibrated=False, router="none", sharing="middle_sequence").check((None, 3))
    budgets_of(calibrated=False).check((None, None))
