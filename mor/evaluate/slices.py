"""Scores of single tokens, summed up by domain, by position and by depth, with standard errors over documents.

Tokens of one document are not independent, so a mean over tokens is a ratio of two sums over documents, sum(a) /
sum(b), and its standard error that of a ratio estimator with documents as clusters (Cochran, Sampling Techniques; for
language models arXiv 2411.00640): sqrt(D / (D - 1) * sum((a_d - ratio * b_d)^2)) / sum(b). A 95% interval is about 1.96
of it to either side; with few documents it is too narrow, so their number is told.

Legend: N rows, T tokens, M predicted tokens, D documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LN2 = math.log(2)
NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class PredictedTokens:
    """The predicted tokens of a text and their scores under one rule and budget, all (M,) in reading order.

    `nll_M`: nats. `depth_M`: block applications of the token before, which predicted. `bytes_M`: UTF-8 bytes.
    `document_M`: number of the document; `place_M`: place in the row, from 1.
    """

    nll_M: Tensor
    depth_M: Tensor
    bytes_M: Tensor
    document_M: Tensor
    place_M: Tensor

    def where(self, chosen_M: Tensor) -> PredictedTokens:
        """Those where `chosen_M` is true."""
        return PredictedTokens(**{name: value[chosen_M] for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some of the predicted tokens: how many, of how many documents, and what predicting them took.

    `nll`: nats per token; `bits_per_byte`: of the tokens' bytes, nan when they have none; both with standard errors
    over documents, nan for fewer than two. `mean_depth`: block applications of the tokens that predicted.
    """

    name: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    nll: float
    nll_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    mean_depth: float

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95% of exp(nll): exp of the interval of nll."""
        margin = NORMAL_95 * self.nll_error
        return math.exp(min(self.nll - margin, 700.0)), math.exp(min(self.nll + margin, 700.0))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What a rule that looks into the future seems to gain: causal NLL minus `top_k` NLL of the same tokens.

    `nll`: the mean difference in nats per token and `nll_error` its standard error over documents, from differences
    token by token. `relative`: to the causal NLL. `causal_depth`, `top_k_depth`: mean depths of either.
    """

    nll: float
    nll_error: float
    relative: float
    causal_depth: float
    top_k_depth: float


def describe(name: str, tokens: PredictedTokens) -> Slice:
    """The slice of all `tokens`. Raises ValueError when there are none."""
    if not len(tokens.nll_M):
        raise ValueError(f"slice {name!r} has no predicted tokens")
    bits, bits_error = ratio(tokens.nll_M / LN2, tokens.bytes_M, tokens.document_M)
    nll, nll_error = ratio(tokens.nll_M, torch.ones_like(tokens.nll_M), tokens.document_M)
    return Slice(
        name=name,
        num_tokens=len(tokens.nll_M),
        num_bytes=int(tokens.bytes_M.sum()),
        num_documents=int((torch.bincount(tokens.document_M) > 0).sum()),
        nll=nll,
        nll_error=nll_error,
        bits_per_byte=bits,
        bits_per_byte_error=bits_error,
        mean_depth=float(tokens.depth_M.double().mean()),
    )


def by_domain(tokens: PredictedTokens, domain_D: Tensor, domains: tuple[str, ...]) -> tuple[Slice, ...]:
    """One slice per domain that has tokens, the largest first."""
    domain_M = domain_D[tokens.document_M]
    found = [describe(domains[n], tokens.where(domain_M == n)) for n in domain_M.unique().tolist()]
    return tuple(sorted(found, key=lambda part: -part.num_tokens))


def by_position(tokens: PredictedTokens) -> tuple[Slice, ...]:
    """Slices of places 1, 2-3, 4-7, ... in the row: how quality grows with the context."""
    octave_M = tokens.place_M.double().log2().floor().long()
    last = int(tokens.place_M.max())
    found = []
    for octave in octave_M.unique().tolist():
        low, high = 2**octave, min(2 ** (octave + 1) - 1, last)
        found.append(describe(str(low) if low == high else f"{low}-{high}", tokens.where(octave_M == octave)))
    return tuple(found)


def by_depth(tokens: PredictedTokens) -> tuple[Slice, ...]:
    """One slice per depth of the token that predicted. Depths are chosen by the router, so a difference between slices
    says which tokens it sends deep, not what depth does to them."""
    return tuple(describe(f"depth {d}", tokens.where(tokens.depth_M == d)) for d in tokens.depth_M.unique().tolist())


def gap(causal: PredictedTokens, top_k: PredictedTokens) -> Gap:
    """The gap between two scores of the same tokens."""
    difference, error = ratio(causal.nll_M - top_k.nll_M, torch.ones_like(causal.nll_M), causal.document_M)
    return Gap(
        nll=difference,
        nll_error=error,
        relative=difference / float(causal.nll_M.double().mean()),
        causal_depth=float(causal.depth_M.double().mean()),
        top_k_depth=float(top_k.depth_M.double().mean()),
    )


def ratio(above_M: Tensor, below_M: Tensor, cluster_M: Tensor) -> tuple[float, float]:
    """sum(above) / sum(below) and its standard error with clusters, numbered from 0, as units; nan for fewer than two
    that there are."""
    # Clusters that have no tokens add nothing to any sum.
    above_D = torch.bincount(cluster_M, weights=above_M.double())
    below_D = torch.bincount(cluster_M, weights=below_M.double())
    total, clusters = float(below_D.sum()), int((torch.bincount(cluster_M) > 0).sum())
    if total == 0:
        return math.nan, math.nan
    value = float(above_D.sum()) / total
    if clusters < 2:
        return value, math.nan
    spread = float((above_D - value * below_D).square().sum())
    return value, math.sqrt(spread * clusters / (clusters - 1)) / total
