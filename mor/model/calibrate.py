"""Calibration: the thresholds that give each mean depth, found on real text and stored with the weights.

For each of a grid of mean depths, all calibration tokens in one forward, which takes as many mean depths as fit: at
every recursion the threshold is the score quantile that lets the planned share of tokens through, given who was let
through before. What a caller asks for later is interpolated in this table.

Legend: G calibration points, R recursions, B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .modeling_mor import MorForCausalLM
from .routing import Router
from .scoring import number_documents, rows_at_once


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration pass found: `mean_depths` reached (G,), their `thresholds` (G, R), and the tokens it used."""

    mean_depths: Tensor
    thresholds: Tensor
    num_tokens: int


def can_calibrate(model: MorForCausalLM) -> bool:
    """Whether the model's router has thresholds to find."""
    router = model.model.recursion.router
    return router is not None and router.can_budget


def calibration_grid(num_recursions: int, num_points: int) -> list[float]:
    """`num_points` mean depths from 1 to R, closer together at both ends, where a threshold moves fastest."""
    steps = [(1 - math.cos(math.pi * i / (num_points - 1))) / 2 for i in range(num_points)]
    return [1 + (num_recursions - 1) * s for s in steps]


@torch.no_grad()
def calibrate(
    model: MorForCausalLM,
    batches: Iterable[Tensor],
    *,
    mean_depths: Sequence[float] | None = None,
    end_of_text: int | None = None,
) -> Calibration:
    """Find and store the thresholds for a grid of mean depths.

    Args:
        model: a model whose router has a budget (`expert_choice`, `token_choice` or `random`).
        batches: rows of token ids (B, T), all of one length; they run as one batch.
        mean_depths: the grid, at most `num_calibration_points` depths from 1 to R. Default: `calibration_grid`.
        end_of_text: attention stays inside documents, which end with this token. None: it crosses them.

    Returns the table, which is also written to the router's buffers and so saved with the weights.

    Raises:
        ValueError: a router without a budget, no tokens, rows of different lengths, or more depths than the table
        holds.
    """
    router = _router(model)
    rows = _rows(batches).to(model.device)
    if mean_depths is None:
        mean_depths = calibration_grid(router.num_recursions, router.calibration_mean_depth.numel())
    if not 2 <= len(mean_depths) <= router.calibration_mean_depth.numel():
        raise ValueError(
            f"mean_depths has {len(mean_depths)} points; the table holds 2 to {router.calibration_mean_depth.numel()} "
            "(num_calibration_points)"
        )
    was_training = model.training
    model.eval()
    try:
        documents = None if end_of_text is None else number_documents(rows, end_of_text)
        each = max(1, rows_at_once(model, rows.shape[1]) // len(rows))
        ordered = sorted(mean_depths)
        found = [
            _solve(model, router, rows, documents, ordered[first : first + each])
            for first in range(0, len(ordered), each)
        ]
    finally:
        model.train(was_training)
    return _store(router, torch.cat(found), rows.numel())


def _router(model: MorForCausalLM) -> Router:
    router = model.model.recursion.router
    if router is None or not router.can_budget:
        raise ValueError(f"router={model.config.router!r} has no budget to calibrate")
    return router


def _rows(batches: Iterable[Tensor]) -> Tensor:
    rows = list(batches)
    lengths = {tuple(batch.shape[1:]) for batch in rows}
    if not rows or sum(batch.numel() for batch in rows) == 0:
        raise ValueError("calibration needs at least one row of tokens")
    if len(lengths) != 1:
        raise ValueError(f"calibration rows must have one length, got {sorted(lengths)}")
    return torch.cat([batch.long() for batch in rows])


def _solve(
    model: MorForCausalLM, router: Router, rows: Tensor, documents: Tensor | None, mean_depths: Sequence[float]
) -> Tensor:
    """(G, 1 + R) the mean depth reached and the thresholds, for each mean depth asked for."""
    rule, parts = router.calibration_rule(mean_depths), len(mean_depths)
    output = model.model(
        input_ids=rows.repeat(parts, 1),
        use_cache=False,
        decision=rule,
        document_ids=None if documents is None else documents.repeat(parts, 1),
    )
    reached_G = output.depths.view(parts, -1).double().mean(1)
    missing = [torch.full_like(reached_G, math.inf)] * (router.num_recursions - len(rule.thresholds))
    return torch.stack([reached_G, *rule.thresholds, *missing], dim=1)


def _store(router: Router, found_GX: Tensor, num_tokens: int) -> Calibration:
    found_GX = found_GX[found_GX[:, 0].argsort(stable=True)]
    points = router.calibration_mean_depth.numel()
    padded_GX = torch.cat([found_GX, found_GX[-1:].expand(points - len(found_GX), -1)])
    router.calibration_mean_depth.copy_(padded_GX[:, 0])
    router.calibration_thresholds.copy_(padded_GX[:, 1:])
    on_host_GX = found_GX.float().cpu()
    return Calibration(mean_depths=on_host_GX[:, 0], thresholds=on_host_GX[:, 1:], num_tokens=num_tokens)
