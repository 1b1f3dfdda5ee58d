"""The language-modelling loss as a strategy: from hidden states and head to the sum of token losses.

Legend: B rows, S columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LmLoss(Protocol):
    """Sum over targets of -log p(target), without keeping the logits. Targets of -100 are ignored."""

    def __call__(self, hidden_BSD: Tensor, head_VD: Tensor, target_BS: Tensor) -> Tensor:
        """The 0-d float32 sum, differentiable in hidden states and head."""
        ...


def lm_loss_of_logits(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """The same sum from logits, in float32."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), target_BS.flatten(), ignore_index=-100, reduction="sum")


def plain_lm_loss(hidden_BSD: Tensor, head_VD: Tensor, target_BS: Tensor) -> Tensor:
    """The slow twin of fused losses: all logits at once."""
    return lm_loss_of_logits(F.linear(hidden_BSD, head_VD), target_BS)
