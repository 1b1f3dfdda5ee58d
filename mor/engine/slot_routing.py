"""Routing of slots, which are each at a recursion of their own.

`begin` decides which rows take the first recursion; `merge` brings the block's output back and decides who goes on. The
arithmetic is the routers' own; what differs is that a row's recursion is a number on the device.

Legend: N rows, D hidden size, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mor.engine.slot_state import Float, Int
from mor.model.decision import DecisionRule, Threshold
from mor.model.depth_plan import DepthPlan
from mor.model.expert_choice import FixedDepths
from mor.model.routing import RecursionRouter, Router
from mor.model.token_choice import DepthRule, TokenChoiceRouter


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Rows that enter: whether each takes the first recursion, its gate there, and the recursion it chose (R - 1 when
    it is asked anew before each)."""

    taken_N: Tensor
    gate_N: Tensor
    target_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Rows after a visit: stream and next input (N, D), whether each takes the next recursion, and its gate there."""

    stream_ND: Tensor
    x_ND: Tensor
    taken_N: Tensor
    gate_N: Tensor


class SlotRouting(Protocol):
    """Who goes round again."""

    def begin(self, x_ND: Tensor, ints: Tensor, floats: Tensor) -> Begun:
        """Decide on the first recursion; rows of the slots' `ints` and `floats`."""
        ...

    def merge(self, stream_ND: Tensor, x_ND: Tensor, y_ND: Tensor, ints: Tensor, floats: Tensor) -> Merged:
        """Take the block's output `y_ND` of rows at recursions 0 and up."""
        ...


def slot_routing(router: Router | None, plan: DepthPlan, rule: DecisionRule | None) -> SlotRouting | None:
    """Routing for a model, None if slots cannot have it. `rule`: its rule for any budget."""
    if router is None:
        return Unrouted(plan)
    if isinstance(router, TokenChoiceRouter):
        return TokenChoiceSlots(router)
    if isinstance(router, RecursionRouter) and isinstance(rule, Threshold | FixedDepths):
        return RecursionSlots(router, rule.depths if isinstance(rule, FixedDepths) else None)
    return None


def thresholds_of(rule: DecisionRule | None, num_recursions: int) -> list[float]:
    """What a request's rule puts into its slot: thresholds, or the biases of depths."""
    if isinstance(rule, Threshold):
        return rule.thresholds.tolist()  # type: ignore[no-any-return]
    if isinstance(rule, DepthRule) and rule.bias is not None:
        return rule.bias.tolist()  # type: ignore[no-any-return]
    return [0.0] * num_recursions


def _thresholds(floats: Tensor) -> Tensor:
    return floats[:, Float.THRESHOLDS :].float()


class Unrouted:
    """Every token takes every recursion, up to its request's limit; the block's output is the stream."""

    def __init__(self, plan: DepthPlan) -> None:
        self._taken = plan.num_recursions if plan.is_sequence else 1

    def begin(self, x_ND: Tensor, ints: Tensor, floats: Tensor) -> Begun:
        limit_N = ints[:, Int.LIMIT]
        return Begun(
            taken_N=limit_N > 0, gate_N=torch.ones_like(floats[:, 0], dtype=torch.float32), target_N=limit_N - 1
        )

    def merge(self, stream_ND: Tensor, x_ND: Tensor, y_ND: Tensor, ints: Tensor, floats: Tensor) -> Merged:
        taken_N = ints[:, Int.RECURSION] + self._taken < ints[:, Int.LIMIT]
        return Merged(stream_ND=y_ND, x_ND=y_ND, taken_N=taken_N, gate_N=floats[:, Float.GATE])


class RecursionSlots:
    """Routers that are asked before each recursion: x + gate * block(x)."""

    def __init__(self, router: RecursionRouter, depths: Sequence[int] | None) -> None:
        self._router, self._num_recursions = router, router.num_recursions
        self._depths: Tensor | None = None
        if depths is not None:
            self._depths = torch.tensor(depths, device=router.training_forwards.device)

    def _decide(self, recursion: int, read: tuple[Tensor, ...], ints: Tensor, floats: Tensor) -> tuple[Tensor, Tensor]:
        """Whether rows take a recursion, and their gates there."""
        number_N = ints[:, Int.NUMBER]
        scores = self._router.score(recursion, read, number_N[:, None])
        if self._depths is None:
            chosen_N = scores.decisive_BA[:, 0] >= _thresholds(floats)[:, recursion]
        else:
            chosen_N = self._depths[number_N % len(self._depths)] > recursion
        return chosen_N & (recursion < ints[:, Int.LIMIT]), scores.gate_BA[:, 0].float()

    def begin(self, x_ND: Tensor, ints: Tensor, floats: Tensor) -> Begun:
        taken_N, gate_N = self._decide(0, self._router.read(0, x_ND[:, None]), ints, floats)
        return Begun(taken_N=taken_N, gate_N=gate_N, target_N=torch.full_like(ints[:, 0], self._num_recursions - 1))

    def merge(self, stream_ND: Tensor, x_ND: Tensor, y_ND: Tensor, ints: Tensor, floats: Tensor) -> Merged:
        recursion_N, gate_N = ints[:, Int.RECURSION], floats[:, Float.GATE].float()
        taken_N, next_gate_N = torch.zeros_like(recursion_N, dtype=torch.bool), gate_N
        merged_ND = stream_ND
        for recursion in range(max(1, self._num_recursions - 1)):
            if recursion == 0:
                x, read = self._router.advance(recursion, x_ND[:, None], y_ND[:, None], gate_N[:, None])
                merged_ND = x[:, 0]
            else:  # the stream is the same at every recursion; what is read for the next is not
                read = self._router.read(recursion + 1, merged_ND[:, None])
            if recursion + 1 < self._num_recursions:
                chosen_N, here_N = self._decide(recursion + 1, read, ints, floats)
                is_here_N = recursion_N == recursion
                taken_N = torch.where(is_here_N, chosen_N, taken_N)
                next_gate_N = torch.where(is_here_N, here_N, next_gate_N)
        active_N1 = ints[:, Int.ACTIVE, None] > 0
        merged_ND = torch.where(active_N1, merged_ND, stream_ND)
        return Merged(stream_ND=merged_ND, x_ND=merged_ND, taken_N=taken_N & active_N1[:, 0], gate_N=next_gate_N)


class TokenChoiceSlots:
    """Token-choice: h <- block(h) until the chosen depth, then stream + gate * h, once."""

    def __init__(self, router: TokenChoiceRouter) -> None:
        self._router = router

    def begin(self, x_ND: Tensor, ints: Tensor, floats: Tensor) -> Begun:
        depth_N, gate_N = self._router.pick(x_ND[:, None], DepthRule(bias=_thresholds(floats)))[:2]
        return Begun(
            taken_N=ints[:, Int.LIMIT] > 0, gate_N=gate_N[:, 0].float(), target_N=depth_N[:, 0].to(torch.int64)
        )

    def merge(self, stream_ND: Tensor, x_ND: Tensor, y_ND: Tensor, ints: Tensor, floats: Tensor) -> Merged:
        recursion_N, target_N = ints[:, Int.RECURSION], ints[:, Int.TARGET]
        gate_N = floats[:, Float.GATE].float()
        weight_N = gate_N if self._router.config.gating == "weighted" else torch.ones_like(gate_N)
        weight_N = torch.where(recursion_N == target_N, weight_N, 0)
        stream_ND = stream_ND + y_ND * weight_N[:, None].to(y_ND.dtype)
        taken_N = (recursion_N < target_N) & (recursion_N + 1 < ints[:, Int.LIMIT])
        return Merged(stream_ND=stream_ND, x_ND=y_ND, taken_N=taken_N, gate_N=gate_N)
