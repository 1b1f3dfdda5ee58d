"""Threshold-choice routing: expert-choice's scores, decided causally in training as well.

Per recursion r a running threshold t_r, which training moves from step to step. A token alive before r takes it iff its
score is at least t_r, whatever the tokens after it are, so that decoding uses the rule that training used. Capacities
hold on average over batches, not in every row.

Legend: B rows, A tokens alive before a recursion, R recursions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_mor import MorConfig
from .decision import DecisionRule, Threshold, boundary
from .expert_choice import ExpertChoiceRouter
from .routing import RecursionRoute, Route, RoutingInput, Scores
from .token_set import HostCounts, TokenSet


@dataclass(frozen=True, kw_only=True)
class MeasuredThreshold(Threshold):
    """The rule of a training forward: thresholds as they are, and the `capacities` that they are to follow."""

    capacities: Sequence[float]


class ThresholdChoiceRouter(ExpertChoiceRouter):
    """Expert-choice whose training rule is its causal rule: a score against a threshold of earlier batches.

    A forward measures the boundary b_r, the score that capacity_r of all the batch's tokens reach among those alive
    before r. After a step t_r <- t_r + w (mean b_r - t_r), w = (1 - d) / (1 - d^n) with decay d at the n-th step: a
    bias-corrected moving average. Before the first step t_r is -inf, and every token takes every recursion.
    """

    running_thresholds: Tensor
    threshold_updates: Tensor
    boundary_sum: Tensor

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        recursions = config.num_recursions
        self.register_buffer("running_thresholds", torch.full((recursions,), -math.inf, dtype=torch.float32))
        self.register_buffer("threshold_updates", torch.zeros(recursions, dtype=torch.float32))
        boundary_sum = torch.zeros(2, recursions, dtype=torch.float32)  # of boundaries, and how many there were
        self.register_buffer("boundary_sum", boundary_sum, persistent=False)

    def initial_buffers(self) -> dict[str, float]:
        own = {"running_thresholds": -math.inf, "threshold_updates": 0, "boundary_sum": 0}
        return {**super().initial_buffers(), **own}

    def default_rule(self) -> DecisionRule:
        """The thresholds of training. A recursion of capacity 1 takes everything."""
        return Threshold(thresholds=self._thresholds_now())

    def trained_rule(self) -> DecisionRule:
        """The same, measured against the capacities of this training forward."""
        return MeasuredThreshold(
            thresholds=self._thresholds_now(), capacities=self.warm_capacities(self.count_forward())
        )

    def _thresholds_now(self) -> Tensor:
        now_R = self.running_thresholds.clone()
        now_R[: sum(capacity >= 1 for capacity in self.trained_shares)].fill_(-math.inf)  # capacities do not rise
        return now_R

    def begin(self, inputs: RoutingInput) -> Route:
        is_measured = self.training and isinstance(inputs.rule, MeasuredThreshold)
        return ThresholdRoute(self, inputs) if is_measured else super().begin(inputs)

    def measure(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, size: float | Tensor) -> Tensor:
        """The boundary that the `size` best of the batch's alive tokens reach, which is also noted."""
        found = boundary(score_BA, valid_BA, size)
        is_there = torch.ones_like(found) if valid_BA is None else valid_BA.any().to(found)
        self.boundary_sum[:, recursion] += torch.stack([found, is_there])
        return found

    def measurements(self) -> tuple[Tensor, ...]:
        return (self.boundary_sum,)

    def update_bias(self) -> None:
        """Move the thresholds towards the boundaries of the forwards since the last step. Those of recursions that no
        token reached stay."""
        sum_R, count_R = self.boundary_sum
        seen_R = count_R > 0
        self.threshold_updates += seen_R
        decay = self.config.threshold_decay
        weight_R = (1 - decay) / (1 - decay**self.threshold_updates)
        mean_R, old_R = sum_R / count_R, self.running_thresholds
        new_R = torch.where(old_R.isinf(), mean_R, old_R + weight_R * (mean_R - old_R))
        self.running_thresholds.copy_(torch.where(seen_R, new_R, old_R))
        self.boundary_sum.zero_()


class ThresholdRoute(RecursionRoute):
    """Routing of one training forward."""

    def pick(self, recursion: int, scores: Scores, valid_BA: Tensor | None) -> TokenSet:
        """The tokens above the threshold. Their number travels to the host while boundary and losses are found.

        The losses teach membership above the boundary: with that above the threshold as the target, scores that move
        together would take themselves along, away from the threshold.
        """
        rule, router = self.inputs.rule, self.router
        assert isinstance(rule, MeasuredThreshold) and isinstance(router, ThresholdChoiceRouter)
        score_BA = scores.decisive_BA.detach()
        keep_BA = rule.keeps(recursion, score_BA, valid_BA)
        weight = self._loss_weight(recursion, valid_BA)
        if router.trained_shares[recursion] >= 1:
            self.add_losses(scores, keep_BA, valid_BA, weight)
            return TokenSet(valid_BK=valid_BA)
        counts = None if router.has_padded_sets else HostCounts(keep_BA.sum(1).amax().reshape(1))
        found = router.measure(recursion, score_BA, valid_BA, self._expected(recursion))
        self.add_losses(scores, score_BA >= found, valid_BA, weight)
        size = score_BA.shape[1]
        if counts is not None:
            # At least one place, absent if need be: every process then uses, and has gradients for, the same weights.
            size = max(1, counts.places(0, size, is_training=True))
        return TokenSet.from_mask(keep_BA, size)

    def _loss_weight(self, recursion: int, valid_BA: Tensor | None) -> Tensor | float:
        """Alive tokens over those that the capacities let expect. Losses, means over the alive, become means over a
        number that no decision changes, so that those of micro-batches add up."""
        return 1.0 if recursion == 0 or valid_BA is None else valid_BA.sum() / self._expected(recursion - 1)

    def _expected(self, recursion: int) -> Tensor | float:
        """The batch's tokens that a recursion's capacity lets through."""
        rule, num_tokens = self.inputs.rule, self.inputs.num_tokens
        assert isinstance(rule, MeasuredThreshold)
        total = num_tokens.sum() if isinstance(num_tokens, Tensor) else num_tokens * len(self.inputs.x_BTD)
        return rule.capacities[recursion] * total
