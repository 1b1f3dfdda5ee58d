"""How scores become decisions: who goes round again.

`top_k` compares a token with its whole row, so it looks into the future: training's rule for expert-choice. `causal`
compares a token with a threshold, so it can decode; threshold-choice trains with it too. Calibration is a third rule
that finds the thresholds.

Legend: B rows, A tokens still alive at a recursion, R recursions. Scores are logits: the gate's activation is monotone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .token_set import TokenSet


class DecisionRule(Protocol):
    """Chooses, among the tokens alive at a recursion, those that take it."""

    @property
    def is_causal(self) -> bool:
        """Whether a token's decision depends on its prefix alone."""
        ...

    def choose(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, num_tokens: Tensor | int) -> TokenSet:
        """The chosen tokens, as a set of the A alive ones. `num_tokens`: real tokens per row, (B,) or one number."""
        ...


class CalibrationRule(DecisionRule, Protocol):
    """A rule that spends given mean depths, each on a part of the batch it sees: parts of as many rows, one after the
    other. `thresholds`: those that did it, (G,) for each recursion that tokens reached."""

    thresholds: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k = max(1, int(capacity * T)) best-scored tokens of each row, T counting the row's real tokens."""

    capacities: Sequence[float]
    is_causal: bool = field(default=False, init=False)

    def choose(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, num_tokens: Tensor | int) -> TokenSet:
        capacity = self.capacities[recursion]
        if isinstance(num_tokens, int) and valid_BA is None:
            return TokenSet.top(score_BA, min(score_BA.shape[1], max(1, int(capacity * num_tokens))))
        assert valid_BA is not None
        size_B = (
            (torch.as_tensor(num_tokens, dtype=torch.float64, device=score_BA.device) * capacity).long().clamp(min=1)
        )
        score_BA = score_BA.masked_fill(~valid_BA, -torch.inf)
        rank_BA = score_BA.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return TokenSet.from_mask((rank_BA < size_B[:, None]) & valid_BA)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Tokens whose score reaches a threshold, one per recursion: (R,) or, with a budget per row, (B, R).

    A recursion whose threshold is -inf takes every token.
    """

    thresholds: Tensor
    is_causal: bool = field(default=True, init=False)

    def choose(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, num_tokens: Tensor | int) -> TokenSet:
        return TokenSet.from_mask(self.keeps(recursion, score_BA, valid_BA))

    def keeps(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None) -> Tensor:
        """Which of the alive tokens take the recursion, (B, A)."""
        keep_BA = score_BA >= self.thresholds[..., recursion, None]
        return keep_BA if valid_BA is None else keep_BA & valid_BA


@dataclass(kw_only=True)
class Quantile:
    """Calibration's rule: in part g of the batch, let the best-scored tokens through until `shares[g][r]` of *all* its
    tokens take recursion r, and remember the scores of the last ones let through in `thresholds`."""

    shares: Sequence[Sequence[float]]
    thresholds: list[Tensor] = field(default_factory=list)
    is_causal: bool = field(default=False, init=False)

    def choose(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, num_tokens: Tensor | int) -> TokenSet:
        rows = len(score_BA) // len(self.shares)
        parts = zip(self.shares, *(_parts(of, rows, len(self.shares)) for of in (score_BA, valid_BA, num_tokens)))
        found = [self._found(recursion, *part) for part in parts]
        self.thresholds.append(torch.stack(found))
        keep_BA = score_BA >= self.thresholds[-1].repeat_interleave(rows)[:, None]
        return TokenSet.from_mask(keep_BA if valid_BA is None else keep_BA & valid_BA)

    def _found(
        self, recursion: int, shares: Sequence[float], score_BA: Tensor, valid_BA: Tensor | None, count: Tensor | int
    ) -> Tensor:
        if recursion == 0 and shares[0] >= 1:
            return torch.full((), -math.inf, device=score_BA.device)
        total = count.sum() if isinstance(count, Tensor) else count * len(score_BA)
        found = boundary(score_BA, valid_BA, shares[recursion] * total)
        # None of this part's tokens came so far: as if the others' had not either.
        return found if valid_BA is None else torch.where(valid_BA.any(), found, math.inf)


def _parts(value: Any, rows: int, number: int) -> Sequence[Any]:
    """A tensor's parts of so many rows; anything else as it is, for each."""
    return value.split(rows) if isinstance(value, Tensor) else [value] * number


def boundary(score_BA: Tensor, valid_BA: Tensor | None, size: float | Tensor) -> Tensor:
    """A threshold that `size` of the real scores, rounded, reach: the middle of the gap below the last one, in float32;
    0 without scores. Found on the device, without waiting for it.
    """
    if score_BA.numel() == 0:
        return score_BA.new_zeros((), dtype=torch.float32)
    score_N = score_BA.float().flatten()
    num_real = torch.full((1,), len(score_N), device=score_N.device)
    if valid_BA is not None:
        score_N, num_real = score_N.masked_fill(~valid_BA.flatten(), -torch.inf), valid_BA.sum().reshape(1)
    ordered_N = score_N.sort(descending=True).values
    size_1 = num_real.clamp(max=size.round().long() if isinstance(size, Tensor) else round(size))
    last = torch.minimum(size_1, num_real - 1).clamp(min=0)
    above, below = (ordered_N.gather(0, index) for index in ((size_1 - 1).clamp(min=0), last))
    above = torch.where(size_1 > 0, above, above + 1)
    below = torch.where(size_1 < num_real, below, below - 1)
    found = torch.where(above > below, (above + below) / 2, above)
    return torch.where(num_real > 0, found, 0).squeeze(0)


def budget_shares(mean_depth: float, capacities: Sequence[float]) -> list[float]:
    """Shares of tokens active at each recursion whose sum is `mean_depth`: (1, 0, ..) to `capacities` to (1, .., 1).

    Raises ValueError outside [1, R].
    """
    num_recursions, trained = len(capacities), sum(capacities)
    if not 1 <= mean_depth <= num_recursions:
        raise ValueError(f"mean_depth={mean_depth} is impossible: choose between 1 and {num_recursions} recursions")
    low = [1.0] + [0.0] * (num_recursions - 1)
    if mean_depth <= trained:
        weight = (mean_depth - 1) / (trained - 1) if trained > 1 else 1.0
        return [a + weight * (b - a) for a, b in zip(low, capacities, strict=True)]
    weight = (mean_depth - trained) / (num_recursions - trained)
    return [c + weight * (1.0 - c) for c in capacities]
