"""Routing of rows by linear scores in numpy, for a CPU: what `RecursionSlots` computes, in a quarter of the time.

At some tens of rows starting an operation of PyTorch takes longer than the operation. Here each row's score is that of
the one recursion that it may take next, and not of all of them.

Legend: N rows, D hidden size, R recursions.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mor.engine.slot_routing import Begun, Merged
from mor.engine.slot_state import Float, Int
from mor.model.expert_choice import ExpertChoiceRouter
from mor.model.routing import Router, ScoreHead

Floats = npt.NDArray[np.float32]


def linear_rows(router: Router | None) -> LinearRows | None:
    """Routing for a router that decides by thresholds on linear scores, None for others."""
    if isinstance(router, ExpertChoiceRouter) and router.config.router_architecture == "linear":
        return LinearRows(router)
    return None


class LinearRows:
    """Expert-choice, and what is built on it: x + gate * block(x)."""

    def __init__(self, router: ExpertChoiceRouter) -> None:
        self._router, self._num_recursions = router, router.num_recursions
        self._weight_RD = _weights(router.heads) / np.float32(router.config.router_temperature)
        auxiliary = router.auxiliary_heads
        self._auxiliary_RD = None if auxiliary is None else _weights(auxiliary)
        self._is_weighted = router.config.gating == "weighted"

    def begin(self, x_ND: Tensor, ints: Tensor, floats: Tensor) -> Begun:
        """See `SlotRouting`."""
        first_N = np.zeros(len(x_ND), dtype=np.int64)
        taken_N, gate_N = self._decide(first_N, x_ND.numpy(), ints.numpy(), floats.numpy())
        return Begun(
            taken_N=torch.from_numpy(taken_N),
            gate_N=gate_N,
            target_N=torch.from_numpy(first_N + self._num_recursions - 1),
        )

    def merge(self, stream_ND: Tensor, x_ND: Tensor, y_ND: Tensor, ints: Tensor, floats: Tensor) -> Merged:
        """See `SlotRouting`."""
        each, limits, x, y = ints.numpy(), floats.numpy(), x_ND.numpy(), y_ND.numpy()
        gate_N = limits[:, Float.GATE].astype(np.float32)
        active_N = each[:, Int.ACTIVE] > 0
        merged = x + (y * gate_N[:, None] if self._is_weighted else y)
        if not active_N.all():
            merged = np.where(active_N[:, None], merged, stream_ND.numpy())
        next_N = each[:, Int.RECURSION] + 1
        is_last_N = next_N == self._num_recursions
        chosen_N, next_gate_N = self._decide(np.where(is_last_N, 0, next_N), merged, each, limits)
        merged_ND = torch.from_numpy(merged)
        return Merged(
            stream_ND=merged_ND,
            x_ND=merged_ND,
            taken_N=torch.from_numpy(chosen_N & active_N & ~is_last_N),
            gate_N=torch.where(torch.from_numpy(is_last_N), torch.from_numpy(gate_N), next_gate_N),
        )

    def _decide(
        self, recursion_N: npt.NDArray[np.int64], x: Floats, ints: npt.NDArray[np.int64], floats: Floats
    ) -> tuple[npt.NDArray[np.bool_], Tensor]:
        """Whether each row takes its recursion, and its gate there."""
        logit_N = (x * self._weight_RD[recursion_N]).sum(1)
        decisive_N = logit_N if self._auxiliary_RD is None else (x * self._auxiliary_RD[recursion_N]).sum(1)
        threshold_N = floats[np.arange(len(x)), Float.THRESHOLDS + recursion_N].astype(np.float32)
        taken_N = (decisive_N >= threshold_N) & (recursion_N < ints[:, Int.LIMIT])
        return taken_N, self._router.gate(torch.from_numpy(logit_N))


def _weights(heads: nn.ModuleList) -> Floats:
    """The heads' weights (R, D)."""
    return (
        torch.cat([cast(nn.Linear, head[0]).weight for head in heads if isinstance(head, ScoreHead)]).detach().numpy()
    )
