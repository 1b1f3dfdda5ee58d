"""Per-token negative log-likelihood and depth of given text: what training's evaluation and `mor evaluate` both use.

A small model's forward costs the host about as much whatever the number of rows, so as many rows as fit are scored at
once. Logits are made a few rows at a time.

Legend: B rows, T tokens, N tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .decision import DecisionRule
from .modeling_mor import MorForCausalLM

WIDEST = {"cuda": 2**28, "cpu": 2**23}  # bytes of a forward's widest activation; caches of a CPU are small
LOGITS = 2**26  # that exist at a time


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """`nll_BT`: -log p(token | earlier tokens) in nats, 0 where not counted. `depths_BT`: block applications of the
    token as an input. `counted_BT`: the tokens that were predicted: real ones with a real token before them."""

    nll_BT: Tensor
    depths_BT: Tensor
    counted_BT: Tensor


def number_documents(input_ids_BT: Tensor, end_of_text: int) -> Tensor:
    """(B, T) the documents of each row, numbered from 0; a document ends with its end-of-text token."""
    return F.pad((input_ids_BT[:, :-1] == end_of_text).cumsum(1), (1, 0))


def rows_at_once(model: MorForCausalLM, length: int) -> int:
    """How many rows of `length` tokens a forward without gradients takes with little memory."""
    widest = max(model.config.hidden_size, model.config.intermediate_size)
    limit = WIDEST["cuda" if model.device.type == "cuda" else "cpu"]
    return max(1, limit // (4 * widest * length))


@torch.no_grad()
def score_tokens(
    model: MorForCausalLM,
    input_ids_BT: Tensor,
    *,
    decision: str | DecisionRule = "causal",
    mean_depth: float | Tensor | None = None,
    attention_mask: Tensor | None = None,
    end_of_text: int | None = None,
) -> TokenScores:
    """Score rows of token ids under a decision rule, `causal` unless another is given, in evaluation mode.

    A model without a router has one rule; for it `decision` must be `causal` and `mean_depth` None. With `end_of_text`
    attention stays inside documents, which end with that token.
    """
    was_training, losses = model.training, TokenLosses()
    model.eval()
    try:
        output = model(
            input_ids_BT,
            labels=input_ids_BT,
            lm_loss=losses,
            attention_mask=attention_mask,
            use_cache=False,
            decision=decision,
            mean_depth=mean_depth,
            document_ids=None if end_of_text is None else number_documents(input_ids_BT, end_of_text),
        )
    finally:
        model.train(was_training)
    real_BT = torch.ones_like(input_ids_BT, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counted_BT = torch.zeros_like(real_BT)
    counted_BT[:, 1:] = real_BT[:, 1:] & real_BT[:, :-1]
    assert losses.loss_BT is not None
    nll_BT = F.pad(losses.loss_BT[:, :-1], (1, 0)).masked_fill(~counted_BT, 0)
    return TokenScores(nll_BT=nll_BT, depths_BT=output.depths, counted_BT=counted_BT)


class TokenLosses:
    """An `LmLoss` that keeps the loss of each token, `loss_BT`: at place t that of predicting t + 1."""

    def __init__(self) -> None:
        self.loss_BT: Tensor | None = None

    def __call__(self, hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor) -> Tensor:
        rows = (hidden_BTD.flatten(0, 1), target_BT.flatten())
        chunk = max(1, LOGITS // len(head_VD))
        losses = [
            F.cross_entropy(F.linear(hidden_ND, head_VD).float(), target_N, reduction="none")
            for hidden_ND, target_N in zip(*(part.split(chunk) for part in rows), strict=True)
        ]
        self.loss_BT = torch.cat(losses).view(target_BT.shape)
        return self.loss_BT.sum()
