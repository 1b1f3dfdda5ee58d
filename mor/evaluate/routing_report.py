"""What a router does on a text: how deep tokens go, what scores it gives, and whether the future is needed to know.

Legend: B rows, T tokens, A tokens scored at a recursion, R recursions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.model.decision import Threshold
from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import RecursionTrace

NUM_BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class RecursionScores:
    """The scores of one recursion's router, mapped to [0, 1].

    `bins`: counts in `NUM_BINS` equal bins. `quantiles`: at `QUANTILES`, nan without scores. `threshold`: the score
    from which a token goes on, 0 when all do. `share`: of all tokens, those that took the recursion.
    """

    bins: tuple[int, ...]
    quantiles: tuple[float, ...]
    threshold: float
    share: float


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """A router on a text, causal decisions unless `decision` says otherwise.

    `depth_counts[d]`: tokens of depth d, from 0. `recursions`: scores by recursion, empty without a learnt router.
    `sampling_accuracy[r]`: share of the tokens scored at recursion r for which the causal rule and top-k agree, and
    `dead_position_ratio`: share of positions whose token never took the last recursion in any row (arXiv 2507.10524,
    Table 13); both under top-k decisions, None for routers that have none.
    """

    decision: str
    num_tokens: int
    depth_counts: tuple[int, ...]
    recursions: tuple[RecursionScores, ...]
    sampling_accuracy: tuple[float, ...] | None
    dead_position_ratio: float | None

    @property
    def mean_depth(self) -> float:
        """Block applications per token."""
        return sum(depth * count for depth, count in enumerate(self.depth_counts)) / max(1, self.num_tokens)


@torch.no_grad()
def routing_report(
    model: MorForCausalLM, batches: Iterable[Tensor], *, mean_depth: float | None = None, decision: str = "causal"
) -> RoutingReport:
    """Run the model on rows (B, T) of tokens, all of one length, and report what its router did.

    Raises ValueError when there are no tokens, or for a budget or decision the model cannot serve.
    """
    router = model.model.recursion.router
    compares = router is not None and "top_k" in router.decisions
    tally = _Tally(model.config.num_recursions)
    was_training = model.training
    model.eval()
    try:
        for rows_BT in batches:
            rows_BT = rows_BT.to(model.device)
            run = {"use_cache": False, "logits_to_keep": 1}
            output = model(rows_BT, decision=decision, mean_depth=mean_depth, **run)
            tally.add(output.depths, [_scores(model, trace) for trace in output.routing], output.routing)
            if compares:
                top = model(rows_BT, decision="top_k", **run)
                tally.compare(top.depths, top.routing, _thresholds(model, mean_depth))
    finally:
        model.train(was_training)
    if not tally.num_tokens:
        raise ValueError("there are no tokens to report on")
    return tally.report(decision, _score_thresholds(model, mean_depth, decision))


def _thresholds(model: MorForCausalLM, mean_depth: float | None) -> list[float]:
    """The causal rule's thresholds on what it compares, per recursion; -inf lets every token through."""
    router = model.model.recursion.router
    assert router is not None
    rule = router.rule("causal", mean_depth)
    return rule.thresholds.tolist() if isinstance(rule, Threshold) else [-math.inf] * model.config.num_recursions


def _score_thresholds(model: MorForCausalLM, mean_depth: float | None, decision: str) -> list[float]:
    """The thresholds on the scale of the scores; 0 where all go on or the rule has none."""
    router = model.model.recursion.router
    if router is None or decision != "causal":
        return [0.0] * model.config.num_recursions
    return [float(_squash(model, torch.tensor(t))) for t in _thresholds(model, mean_depth)]


def _scores(model: MorForCausalLM, trace: RecursionTrace) -> Tensor:
    """The scores in [0, 1] of one trace's real tokens: (N,), or (N, R) for token-choice."""
    if model.config.router == "token_choice":
        logits = trace.logits_BA[trace.valid_BA].float()
        return logits.softmax(-1) if model.config.router_activation == "softmax" else logits.sigmoid()
    decisive_BA = trace.logits_BA if model.config.router in ("fixed", "gate") else trace.decisive_BA
    return _squash(model, decisive_BA[trace.valid_BA].float())


def _squash(model: MorForCausalLM, logits: Tensor) -> Tensor:
    """Router logits to [0, 1], monotonously; the random router's scores lie there already."""
    if model.config.router == "random":
        return logits.clamp(0, 1)
    return logits.sigmoid()


class _Tally:
    """Running counts over batches."""

    def __init__(self, num_recursions: int) -> None:
        self.num_recursions, self.num_tokens = num_recursions, 0
        self.depths = torch.zeros(num_recursions + 1, dtype=torch.int64)
        self.scores: list[list[Tensor]] = [[] for _ in range(num_recursions)]
        self.right = torch.zeros(num_recursions, dtype=torch.int64)
        self.scored = torch.zeros(num_recursions, dtype=torch.int64)
        self.visits: Tensor | None = None

    def add(self, depths_BT: Tensor, scores: list[Tensor], routing: tuple[RecursionTrace, ...]) -> None:
        self.num_tokens += depths_BT.numel()
        self.depths += torch.bincount(depths_BT.flatten(), minlength=self.num_recursions + 1).cpu()
        for trace, score in zip(routing, scores, strict=True):
            columns = score.unbind(-1) if score.dim() == 2 else (score,)
            for offset, column in enumerate(columns):
                self.scores[trace.recursion + offset].append(column.cpu())

    def compare(self, depths_BT: Tensor, routing: tuple[RecursionTrace, ...], thresholds: list[float]) -> None:
        """Count where the causal rule would have chosen as top-k did, on the tokens that top-k scored."""
        for trace in routing:
            agree_BA = ((trace.decisive_BA >= thresholds[trace.recursion]) == trace.kept_BA) & trace.valid_BA
            self.right[trace.recursion] += agree_BA.sum().cpu()
            self.scored[trace.recursion] += trace.valid_BA.sum().cpu()
        deepest_T = (depths_BT == self.num_recursions).sum(0).cpu()
        self.visits = deepest_T if self.visits is None else self.visits + deepest_T

    def report(self, decision: str, thresholds: list[float]) -> RoutingReport:
        has_scores = any(self.scores)
        accuracy = (self.right / self.scored.clamp(min=1)).tolist() if self.visits is not None else None
        return RoutingReport(
            decision=decision,
            num_tokens=self.num_tokens,
            depth_counts=tuple(self.depths.tolist()),
            recursions=tuple(map(self._recursion, range(self.num_recursions), thresholds)) if has_scores else (),
            sampling_accuracy=None if accuracy is None else tuple(accuracy),
            dead_position_ratio=None if self.visits is None else float((self.visits == 0).double().mean()),
        )

    def _recursion(self, recursion: int, threshold: float) -> RecursionScores:
        parts = self.scores[recursion]
        score = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
        quantiles = torch.quantile(score, torch.tensor(QUANTILES, dtype=torch.float64)) if len(score) else None
        bins = torch.histc(score, NUM_BINS, 0, 1) if len(score) else torch.zeros(NUM_BINS)
        return RecursionScores(
            bins=tuple(map(int, bins.tolist())),
            quantiles=(math.nan,) * len(QUANTILES) if quantiles is None else tuple(quantiles.tolist()),
            threshold=threshold,
            share=float(self.depths[recursion + 1 :].sum()) / self.num_tokens,
        )
