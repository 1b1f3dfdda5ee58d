"""A model's quality on held-out text: all of it, its parts, and the gap to a rule that sees the future, in one pass.

Legend: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.evaluate.perplexity import Quality, QualityTally
from mor.evaluate.slices import Gap, PredictedTokens, Slice, by_depth, by_domain, by_position, describe, gap
from mor.evaluate.text import HeldOut
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import TokenScores, score_tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One rule and budget on a text. `quality` has standard errors over documents, and `total` the same as a slice;
    `by_domain`, `by_position` and `by_depth` are its parts. `gap` is causal minus `top_k` at the budget, None for a
    router without `top_k` and where it was not asked for."""

    quality: Quality
    total: Slice
    by_domain: tuple[Slice, ...]
    by_position: tuple[Slice, ...]
    by_depth: tuple[Slice, ...]
    gap: Gap | None

    @property
    def parts(self) -> dict[str, tuple[Slice, ...]]:
        """The parts by what they go by."""
        return {"domain": self.by_domain, "position": self.by_position, "depth": self.by_depth}


def has_top_k(model: MorForCausalLM) -> bool:
    """Whether the model's router has the rule that sees the whole row."""
    router = model.model.recursion.router
    return router is not None and "top_k" in router.decisions


def evaluate_text(
    model: MorForCausalLM,
    text: HeldOut,
    *,
    token_bytes: Tensor,
    budgets: Sequence[float | None] = (None,),
    decision: str = "causal",
    batch_size: int = 8,
    end_of_text: int | None = None,
    with_gap: bool = False,
) -> list[Evaluation]:
    """Score a text under each budget, reading it once.

    Args:
        token_bytes: (V,) UTF-8 bytes of each token, see `token_byte_lengths`.
        budgets: mean depths; None is the model's own.
        decision: `causal`, or by name `top_k`, which looks into the future.
        end_of_text: attention stays inside documents, which end with this token. None: it crosses them.
        with_gap: also score under `top_k` at each budget, where the router has it and `decision` is `causal`.

    Raises:
        ValueError: no predicted tokens, or a budget or decision the model cannot serve.
    """
    pairs = [(decision, budget) for budget in budgets]
    if with_gap and decision == "causal" and has_top_k(model):
        pairs += [("top_k", budget) for budget in budgets]
    records = [_Record(model, text, token_bytes) for _ in pairs]
    for rows_BT in text.rows_NT.split(batch_size):
        place_BT = rows_BT.to(model.device)
        for record, (rule, budget) in zip(records, pairs, strict=True):
            scores = score_tokens(model, place_BT, decision=rule, mean_depth=budget, end_of_text=end_of_text)
            record.add(scores, rows_BT)
    ahead = records[len(budgets) :] or [None] * len(budgets)
    return [
        record.evaluation(decision, budget, other)
        for record, budget, other in zip(records, budgets, ahead, strict=False)
    ]


class _Record:
    """The scores of one rule and budget, row by row."""

    def __init__(self, model: MorForCausalLM, text: HeldOut, token_bytes: Tensor) -> None:
        self._config, self._text, self._token_bytes = model.config, text, token_bytes.cpu()
        self._tally = QualityTally(num_recursions=model.config.num_recursions)
        self._nll, self._depths = list[Tensor](), list[Tensor]()

    def add(self, scores: TokenScores, rows_BT: Tensor) -> None:
        on_host = TokenScores(**{name: value.cpu() for name, value in vars(scores).items()})
        self._tally.add(on_host, self._token_bytes[rows_BT])
        self._nll.append(on_host.nll_BT[:, 1:])
        self._depths.append(on_host.depths_BT[:, :-1])

    def tokens(self) -> PredictedTokens:
        targets_NM = self._text.rows_NT[:, 1:]
        return PredictedTokens(
            nll_M=torch.cat(self._nll).flatten(),
            depth_M=torch.cat(self._depths).flatten(),
            bytes_M=self._token_bytes[targets_NM].flatten(),
            document_M=self._text.document_NT[:, 1:].flatten(),
            place_M=torch.arange(1, targets_NM.shape[1] + 1).expand_as(targets_NM).flatten(),
        )

    def evaluation(self, decision: str, budget: float | None, other: _Record | None) -> Evaluation:
        quality, tokens = self._tally.quality(decision, budget, self._config), self.tokens()
        total = describe("all", tokens)
        errors = {"nll_error": total.nll_error, "bits_per_byte_error": total.bits_per_byte_error}
        return Evaluation(
            quality=dataclasses.replace(quality, **errors),
            total=total,
            by_domain=by_domain(tokens, self._text.domain_D, self._text.domains),
            by_position=by_position(tokens),
            by_depth=by_depth(tokens),
            gap=None if other is None else gap(tokens, other.tokens()),
        )
