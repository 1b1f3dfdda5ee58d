"""Losses that train a router, and the load statistics they balance.

Legend: B rows, A tokens scored at a recursion, R recursions. `valid_BA` marks real tokens; None means all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(x_BA: Tensor, valid_BA: Tensor | None) -> Tensor:
    """Mean over real tokens; 0 where there is none."""
    if valid_BA is None:
        return x_BA.mean()
    return x_BA.masked_fill(~valid_BA, 0).sum() / valid_BA.sum().clamp(min=1)


def membership_loss(logits_BA: Tensor, member_BA: Tensor, valid_BA: Tensor | None) -> Tensor:
    """Binary cross-entropy of a router's logits against membership in its own top-k (arXiv 2507.10524, 2.2).

    Teaches the router, or an auxiliary router, to decide without seeing the future.
    """
    loss_BA = F.binary_cross_entropy_with_logits(logits_BA, member_BA.to(logits_BA.dtype), reduction="none")
    return masked_mean(loss_BA, valid_BA)


def z_loss(logits_BAR: Tensor, valid_BA: Tensor | None) -> Tensor:
    """Mean squared log-partition of the router's logits (arXiv 2202.08906, eq. 5); one logit is its own
    log-partition.
    """
    return masked_mean(torch.logsumexp(logits_BAR, dim=-1).square(), valid_BA)


def depth_load(choice_BA: Tensor, num_recursions: int, valid_BA: Tensor | None) -> Tensor:
    """(R,) share of real tokens that chose each depth; `choice` is 0-based."""
    chosen_BAR = (choice_BA[..., None] == torch.arange(num_recursions, device=choice_BA.device)).float()
    return torch.stack([masked_mean(chosen_BAR[..., r], valid_BA) for r in range(num_recursions)])


def balancing_loss(score_BAR: Tensor, load_R: Tensor, valid_BA: Tensor | None) -> Tensor:
    """R * sum_r load_r * mean score_r (arXiv 2507.10524, 2.2): 1 when depths are used evenly and scores sum to 1."""
    mean_score_R = torch.stack([masked_mean(score_BAR[..., r], valid_BA) for r in range(score_BAR.shape[-1])])
    return score_BAR.shape[-1] * (load_R * mean_score_R).sum()
