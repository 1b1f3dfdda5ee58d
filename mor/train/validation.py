"""Quality on held-out text while training, under decision rules that are named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mor.model.calibrate import calibrate, can_calibrate
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import rows_at_once, score_tokens
from mor.train.parallel import OneProcess, Parallel
from mor.train.precision import autocast

TRAINED_BY_TOP_K = ("expert_choice", "random")


def trained_mean_depth(model: MorForCausalLM) -> float | None:
    """The mean depth that training aims at, for routers that need a budget to decide causally what training decided by
    top-k; None for the others."""
    if model.config.router not in TRAINED_BY_TOP_K:
        return None
    assert model.config.capacities is not None
    return max(1.0, sum(model.config.capacities))


class Validator:
    """Scores fixed validation rows.

    `rows`: (B, T) batches to score; empty: nothing is. `calibration_rows`: training rows that thresholds are taken
    from; empty: none are.
    `bytes_per_token`: of the validation text. `dtype`: of matrix products. `end_of_text`: attention stays inside
    documents, which end with this token; None: it crosses them. `parallel`: how ranks share the model; they share the
    scoring, and each calibrates on all calibration rows.
    """

    def __init__(
        self,
        *,
        rows: Sequence[Tensor],
        calibration_rows: Sequence[Tensor],
        bytes_per_token: float,
        dtype: torch.dtype = torch.float32,
        end_of_text: int | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self._rows, self._calibration_rows = rows, calibration_rows
        self._bytes_per_token, self._dtype, self._end_of_text = bytes_per_token, dtype, end_of_text
        self._parallel = OneProcess() if parallel is None else parallel

    @property
    def calibrates(self) -> bool:
        """Whether it takes thresholds at all."""
        return bool(self._calibration_rows)

    def evaluate(self, model: MorForCausalLM) -> dict[str, dict[str, float]]:
        """Scores by decision rule: `causal`, and for routers that know it `top_k`, whose gap to causal it shows.

        Routers that train by top-k are calibrated first, to their trained mean depth and on a quarter of the rows, so
        that the causal thresholds fit the weights of the moment. The model's mode and the random generators are left as
        they were. Empty without rows to score.
        """
        with _aside(model), self._parallel.evaluating(model), autocast(model.device, self._dtype):
            depth = trained_mean_depth(model) if self.calibrates else None
            if depth is not None and self._rows:
                grid = _bracket(depth, model.config.num_recursions)
                few = self._calibration_rows[::4]
                calibrate(model, self._on_device(model, few), mean_depths=grid, end_of_text=self._end_of_text)
            return self._scores(model, depth)

    def finish(self, model: MorForCausalLM) -> dict[str, dict[str, float]]:
        """As `evaluate`, after calibrating every router that has a budget over the whole range of budgets.

        In float32, as thresholds that outlive the run should be, unless weights are brought together in less.
        """
        dtype = self._parallel.gathered_dtype
        with _aside(model), self._parallel.evaluating(model), autocast(model.device, dtype):
            depth = trained_mean_depth(model) if self.calibrates else None
            if self.calibrates and can_calibrate(model):
                rows = self._on_device(model, self._calibration_rows)
                calibrate(model, rows, end_of_text=self._end_of_text)
            return self._scores(model, depth)

    def _scores(self, model: MorForCausalLM, mean_depth: float | None) -> dict[str, dict[str, float]]:
        if not self._rows:
            return {}
        scores = {"causal": self._score(model, "causal", mean_depth)}
        router = model.model.recursion.router
        if router is not None and "top_k" in router.decisions:
            scores["top_k"] = self._score(model, "top_k", None)
        return scores

    def _score(self, model: MorForCausalLM, decision: str, mean_depth: float | None) -> dict[str, float]:
        parts = list[Tensor]()
        for rows, counts in self._share(model):
            rows = rows.to(model.device)
            scores = score_tokens(model, rows, decision=decision, mean_depth=mean_depth, end_of_text=self._end_of_text)
            if counts:
                nll, tokens, depths = scores.nll_BT.double().sum(), scores.counted_BT.sum(), scores.depths_BT.sum()
                parts.append(torch.stack([nll, tokens, depths, torch.full_like(tokens, scores.depths_BT.numel())]))
        here = torch.stack(parts).sum(0).tolist() if parts else [0.0] * 4
        every = self._parallel.ranks.each(lambda: here)
        total, tokens, depths, visited = (sum(column) for column in zip(*every))
        nll = total / tokens
        return {
            "nll": nll,
            "bits_per_byte": nll / math.log(2) / self._bytes_per_token,
            "mean_depth": depths / visited,
            "tokens": int(tokens),
        }

    def _share(self, model: MorForCausalLM) -> Iterator[tuple[Tensor, bool]]:
        """This rank's batches, and whether they count: ranks run as many forwards each, as bringing weights together
        needs them all."""
        ranks, rows = self._parallel.ranks, self._rows
        if ranks.size == 1:
            rows = torch.cat(list(rows)).split(max(len(rows[0]), rows_at_once(model, rows[0].shape[1])))
        for first in range(0, len(rows), ranks.size):
            mine = first + ranks.rank
            yield rows[min(mine, len(rows) - 1)], mine < len(rows)

    def _on_device(self, model: MorForCausalLM, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        return (batch.to(model.device) for batch in rows)


def _bracket(mean_depth: float, num_recursions: int) -> list[float]:
    """The depth and a little to both sides, so that it lies inside the calibration table."""
    margin = 0.05 * (num_recursions - 1)
    return [max(1.0, mean_depth - margin), mean_depth, min(float(num_recursions), mean_depth + margin)]


@contextmanager
def _aside(model: MorForCausalLM) -> Iterator[None]:
    """Leave the model's mode and the random generators as they were, whatever happens inside."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
