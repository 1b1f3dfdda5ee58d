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
        bytes_BT, rows_BT = token_bytes.cpu()[rows_BT.cpu()].to(model.device), rows_BT.to(model.device)
        for tally, budget in zip(tallies, budgets, strict=True):
            scores = score_tokens(model, rows_BT, decision=decision, mean_depth=budget, end_of_text=end_of_text)
            tally.add(scores, bytes_BT)
    return [tally.quality(decision, budget, model.config) for tally, budget in zip(tallies, budgets, strict=True)]


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
    """Sums of one budget's scores, and the quality they amount to. They stay on the scores' device until they are asked
    for, so that it is not waited for after every batch."""

    num_recursions: int
    row_sums: list[Tensor] = field(default_factory=list)
    row_counts: list[Tensor] = field(default_factory=list)
    row_bytes: list[Tensor] = field(default_factory=list)
    levels: list[Tensor] = field(default_factory=list)
    active: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, scores: TokenScores, bytes_BT: Tensor) -> None:
        """Take in the scores of rows (B, T) and the bytes of their tokens."""
        nll_BT, counted_BT, depths_BT = scores.nll_BT.double(), scores.counted_BT, scores.depths_BT
        self.row_sums.append(nll_BT.sum(1))
        self.row_counts.append(counted_BT.sum(1))
        self.row_bytes.append((bytes_BT * counted_BT).sum(1))
        at_level = [depths_BT == depth for depth in range(self.num_recursions + 1)]
        predictors = [level[:, :-1] & counted_BT[:, 1:] for level in at_level]
        sums = [
            torch.stack([level.sum(), of.sum(), (nll_BT[:, 1:] * of).sum()])
            for level, of in zip(at_level, predictors, strict=True)
        ]
        self.levels.append(torch.stack(sums))
        active_RB = torch.stack([(depths_BT > r).sum(1) for r in range(self.num_recursions)])
        self.active.append((depths_BT.shape[1], active_RB))

    def quality(self, decision: str, requested: float | None, config: Any) -> Quality:
        """Of all rows so far. Raises ValueError when they have no predicted tokens."""
        sums, counts = (_joined(parts).tolist() for parts in (self.row_sums, self.row_counts))
        total, count = math.fsum(sums), sum(counts)
        if count == 0:
            raise ValueError("the text has no predicted tokens: give rows of at least two tokens")
        nll, error = total / count, clustered_error(sums, counts)
        num_bytes = int(_joined(self.row_bytes).sum())
        per_byte = count / LN2 / num_bytes if num_bytes else math.nan
        inputs_L, counts_L, nll_L = torch.stack(self.levels).sum(0).T.tolist()
        kv, flops = self._costs(config)
        num_inputs = sum(inputs_L)
        return Quality(
            decision=decision,
            requested=requested,
            num_tokens=count,
            num_bytes=num_bytes,
            nll=nll,
            nll_error=error,
            bits_per_byte=nll * per_byte,
            bits_per_byte_error=error * per_byte,
            mean_depth=sum(depth * number for depth, number in enumerate(inputs_L)) / num_inputs,
            nll_by_depth=tuple(s / n if n else math.nan for s, n in zip(nll_L, counts_L, strict=True)),
            tokens_by_depth=tuple(map(int, inputs_L)),
            kv_bytes_per_token=kv / num_inputs,
            flops_per_token=flops / num_inputs,
        )

    def _costs(self, config: Any) -> tuple[float, float]:
        """Bytes of keys and values, and FLOPs, of all rows."""
        kv = flops = 0.0
        for length, active_RB in self.active:
            counts = active_RB.double().cpu().numpy()
            flops += float(complete_flops(config, length, active=list(counts)).sum())
            # Bytes grow with the counts: those of all rows are those of one long row.
            kv += kv_bytes(config, list(map(int, counts.sum(1))), num_tokens=counts.shape[1] * length)
        return kv, flops


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)


def clustered_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(counts), rows being independent but not their tokens; nan for one row."""
    rows = len(sums)
    if rows < 2:
        return math.nan
    mean = math.fsum(sums) / sum(counts)
    spread = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(spread * rows / (rows - 1)) / sum(counts)
