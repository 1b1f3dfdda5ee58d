"""The compute dial of each request: how its mean depth and its limit of recursions become a decision rule for rows.

Legend: N rows, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.engine.params import MOST_BUDGETS, Budget
from mor.engine.sending import sent
from mor.model.decision import DecisionRule, Threshold
from mor.model.depth_plan import DepthPlan
from mor.model.routing import Router
from mor.model.token_choice import DepthRule, TokenChoiceRouter


class Budgets:
    """Rules for rows that each have a budget of their own."""

    def __init__(self, router: Router | None, plan: DepthPlan) -> None:
        self._router, self._plan, self._num_recursions = router, plan, plan.num_recursions
        self._rules: dict[Budget, DecisionRule] = {}

    @property
    def has_router(self) -> bool:
        """Whether there is anything to decide."""
        return self._router is not None

    def check(self, budget: Budget) -> None:
        """Raises ValueError for what the model cannot do."""
        mean_depth, most = budget
        if most is not None and not 1 <= most <= self._num_recursions:
            raise ValueError(f"max_recursions={most} must be between 1 and the model's {self._num_recursions}")
        if most not in (None, self._num_recursions) and self._plan.is_sequence:
            raise ValueError(f"max_recursions={most} needs whole-block recursions; this model's layers repeat in place")
        if self._router is not None:
            self._rule(budget)
        elif mean_depth is not None:
            raise ValueError(f"mean_depth={mean_depth} needs a router; this model's tokens take every recursion")

    def limit(self, budget: Budget) -> int:
        """The most recursions a token may take."""
        return self._num_recursions if budget[1] is None else budget[1]

    def rule(self, budgets: Sequence[Budget], counts: Sequence[int] | None = None) -> DecisionRule:
        """One rule for rows with these budgets. `counts`: rows of each budget, None for one."""
        rules = [self._rule(budget) for budget in budgets]
        if all(rule is rules[0] for rule in rules):
            return rules[0]

        def of_rows(parts: list[Tensor]) -> Tensor:
            if counts is None:
                return torch.stack(parts)
            which = torch.from_numpy(np.repeat(np.arange(len(parts)), counts))
            return torch.stack(parts).index_select(0, sent(which, parts[0].device))

        if isinstance(rules[0], Threshold):
            return Threshold(thresholds=of_rows([rule.thresholds for rule in rules]))  # type: ignore[attr-defined]
        if isinstance(rules[0], DepthRule):
            return DepthRule(bias=of_rows([rule.bias for rule in rules]))  # type: ignore[attr-defined]
        return rules[0]  # a rule without a budget is the same for all

    def _rule(self, budget: Budget) -> DecisionRule:
        if budget not in self._rules:
            assert self._router is not None
            rule = self._router.rule("causal", budget[0])
            if isinstance(self._router, TokenChoiceRouter) and isinstance(rule, DepthRule):
                rule = DepthRule(bias=self._capped(rule.bias, self.limit(budget)))
            make_room(self._rules)
            self._rules[budget] = rule
        return self._rules[budget]

    def _capped(self, bias_R: Tensor | None, most: int) -> Tensor:
        """Token-choice adds the block's output at its chosen depth alone, so that it must not choose one beyond."""
        assert self._router is not None
        if bias_R is None:
            bias_R = torch.zeros(self._num_recursions, device=self._router.training_forwards.device)
        beyond_R = torch.arange(self._num_recursions, device=bias_R.device) >= most
        bias_R = bias_R.masked_fill(beyond_R, -torch.inf)
        if bool(bias_R.isneginf().all()):  # every token was to go deeper: as deep as it may, then
            bias_R[most - 1] = 0
        return bias_R


def make_room(kept: dict[Budget, Any]) -> None:
    """For one more budget: the oldest gives way to it."""
    if len(kept) >= MOST_BUDGETS:
        del kept[next(iter(kept))]
