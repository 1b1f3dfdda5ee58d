"""Negative log-likelihood of held-out text, in one pass for several budgets.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mor.model.cost import complete_flops, kv_bytes
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import TokenScores, score_tokens

LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a model predicts a text under one decision rule and one budget.

    `decision`: the rule; `top_k` looks into the future, so its numbers are not those of a language model. `requested`:
    the mean depth asked for, None for the model's own. `nll`: nats per predicted token; `nll_error`: its standard error
    over rows. `bits_per_byte`: bits spent per UTF-8 byte of the predicted tokens, comparable across tokenizers.
    `mean_depth`: block applications per token. `tokens_by_depth[d]`: tokens of depth d, from 0, and `nll_by_depth[d]`
    the mean NLL of what they predict next. `kv_bytes_per_token`: bf16, and `flops_per_token`: forward, by the complete
    rule, both at the depths that were used.
    """

    decision: str
    requested: float | None
    num_tokens: int
    num_bytes: int
    nll: float
    nll_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    mean_depth: float
    nll_by_depth: tuple[float, ...]
    tokens_by_depth: tuple[int, ...]
    kv_bytes_per_token: float
    flops_per_token: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(min(self.nll, 700.0))


def measure_quality(
    model: MorForCausalLM,
    batches: Iterable[Tensor],
    *,
    token_bytes: Tensor,
    budgets: Sequence[float | None] = (None,),
    decision: str = "causal",
    end_of_text: int | None = None,
) -> list[Quality]:
    """Score rows of tokens under each budget, reading the text once.

    Args:
        batches: rows (B, T) of token ids; every row's first token is not predicted.
        token_bytes: (V,) UTF-8 bytes of each token, see `token_byte_lengths`.
        budgets: mean depths; None is the model's own.
        decision: `causal`, or by name `top_k`, which looks into the future.
        end_of_text: attention stays inside documents, which end with this token, as in training with
            `data.document_masking`. None: it crosses them, as generation does.

    Raises:
        ValueError: no predicted tokens, or a budget or decision the model cannot serve.
    """
    tallies = [QualityTally(num_recursions=model.config.num_recursions) for _ in budgets]
    for rows_BT in batches:
        rows_BT = rows_BT.to(model.device)
        for tally, budget in zip(tallies, budgets, strict=True):
            scores = score_tokens(model, rows_BT, decision=decision, mean_depth=budget, end_of_text=end_of_text)
            tally.add(scores, token_bytes.to(rows_BT.device)[rows_BT], model.config)
    return [tally.quality(decision, budget) for tally, budget in zip(tallies, budgets, strict=True)]


def token_byte_lengths(tokenizer: Any) -> Tensor:
    """(V,) the UTF-8 bytes each token of a byte-level tokenizer stands for; special tokens stand for none.

    A tokenizer that is not byte-level is measured by decoding its tokens one by one.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    special, added = set(tokenizer.all_special_ids), tokenizer.get_added_vocab()
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    lengths = torch.zeros(size, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            one_character_per_byte = is_byte_level and token not in added
            lengths[index] = len(token) if one_character_per_byte else len(tokenizer.decode([index]).encode())
    return lengths


@dataclass(kw_only=True)
class QualityTally:
    """Running sums of one budget's scores, and the quality they amount to."""

    num_recursions: int
    row_sums: list[float] = field(default_factory=list)
    row_counts: list[int] = field(default_factory=list)
    num_bytes: int = 0
    num_inputs: int = 0
    kv: float = 0.0
    flops: float = 0.0

    def __post_init__(self) -> None:
        levels = self.num_recursions + 1
        self.depth_inputs = torch.zeros(levels, dtype=torch.int64)
        self.depth_counts = torch.zeros(levels, dtype=torch.int64)
        self.depth_sums = torch.zeros(levels, dtype=torch.float64)

    def add(self, scores: TokenScores, bytes_BT: Tensor, config: Any) -> None:
        """Take in the scores of rows (B, T) and the bytes of their tokens."""
        nll_BT, counted_BT = scores.nll_BT.double(), scores.counted_BT
        self.row_sums += nll_BT.sum(1).tolist()
        self.row_counts += counted_BT.sum(1).tolist()
        self.num_bytes += int(bytes_BT[counted_BT].sum())
        self.num_inputs += counted_BT.numel()
        levels = self.num_recursions + 1
        self.depth_inputs += torch.bincount(scores.depths_BT.flatten(), minlength=levels).cpu()
        predictors = scores.depths_BT[:, :-1][counted_BT[:, 1:]]
        self.depth_counts += torch.bincount(predictors, minlength=levels).cpu()
        predicted = nll_BT[:, 1:][counted_BT[:, 1:]]
        self.depth_sums += torch.bincount(predictors, weights=predicted, minlength=levels).cpu()
        self._add_costs(scores.depths_BT, config)

    def _add_costs(self, depths_BT: Tensor, config: Any) -> None:
        length = depths_BT.shape[1]
        active_BR = torch.stack([(depths_BT > r).sum(1) for r in range(self.num_recursions)], dim=1)
        for active in active_BR.tolist():
            self.kv += kv_bytes(config, active, num_tokens=length)
            self.flops += complete_flops(config, length, active=active)

    def quality(self, decision: str, requested: float | None) -> Quality:
        """Of all rows so far. Raises ValueError when they have no predicted tokens."""
        total, count = math.fsum(self.row_sums), sum(self.row_counts)
        if count == 0:
            raise ValueError("the text has no predicted tokens: give rows of at least two tokens")
        nll, error = total / count, clustered_error(self.row_sums, self.row_counts)
        per_byte = count / LN2 / self.num_bytes if self.num_bytes else math.nan
        depths = torch.arange(self.num_recursions + 1)
        by_depth = zip(self.depth_sums.tolist(), self.depth_counts.tolist(), strict=True)
        return Quality(
            decision=decision,
            requested=requested,
            num_tokens=count,
            num_bytes=self.num_bytes,
            nll=nll,
            nll_error=error,
            bits_per_byte=nll * per_byte,
            bits_per_byte_error=error * per_byte,
            mean_depth=float((self.depth_inputs * depths).sum()) / self.num_inputs,
            nll_by_depth=tuple(s / n if n else math.nan for s, n in by_depth),
            tokens_by_depth=tuple(self.depth_inputs.tolist()),
            kv_bytes_per_token=self.kv / self.num_inputs,
            flops_per_token=self.flops / self.num_inputs,
        )


def clustered_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(counts), rows being independent but not their tokens; nan for one row."""
    rows = len(sums)
    if rows < 2:
        return math.nan
    mean = math.fsum(sums) / sum(counts)
    spread = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(spread * rows / (rows - 1)) / sum(counts)
