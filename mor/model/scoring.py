"""Per-token negative log-likelihood and depth of given text: what training's evaluation and `mor evaluate` both use.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_mor import MorForCausalLM


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


@torch.no_grad()
def score_tokens(
    model: MorForCausalLM,
    input_ids_BT: Tensor,
    *,
    decision: str = "causal",
    mean_depth: float | Tensor | None = None,
    attention_mask: Tensor | None = None,
    end_of_text: int | None = None,
) -> TokenScores:
    """Score rows of token ids under a named decision rule, with the model in evaluation mode.

    A model without a router has one rule; for it `decision` must be `causal` and `mean_depth` None. With `end_of_text`
    attention stays inside documents, which end with that token.
    """
    was_training = model.training
    model.eval()
    try:
        output = model(
            input_ids_BT,
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
    nll_BT = torch.zeros(input_ids_BT.shape, dtype=torch.float32, device=input_ids_BT.device)
    logits = output.logits[:, :-1].float().flatten(0, 1)
    nll_BT[:, 1:] = F.cross_entropy(logits, input_ids_BT[:, 1:].flatten(), reduction="none").view(len(nll_BT), -1)
    return TokenScores(nll_BT=nll_BT.masked_fill(~counted_BT, 0), depths_BT=output.depths, counted_BT=counted_BT)
