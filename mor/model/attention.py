"""Attention of a set of active tokens over the keys and values they may see.

Legend: B rows, K queries (active tokens), L keys, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranged_attention import KeyRange


class KeysValues(Protocol):
    """Where a visit's keys and values come from. `projects`: whether this recursion makes some of its own."""

    projects: bool

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, L, E) that layer application `layer` attends to; `own` are those just made."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionScope:
    """What the active tokens of one visit see.

    `mask_BKL`: true where query K may see key L; None is plain causal order when `is_causal`, else everything.
    `key_range`: instead of a mask, the first and the last key that each query sees.
    `row_index`: the batch rows that take part, None for all.
    """

    cos_BKE: Tensor
    sin_BKE: Tensor
    keys_values: KeysValues
    mask_BKL: Tensor | None = None
    key_range: KeyRange | None = None
    is_causal: bool = True
    row_index: Tensor | None = None

    def on_rows(self, x_BKD: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run` applied to the rows that take part; the others come back as zeros."""
        if self.row_index is None:
            return run(x_BKD)
        y_BKD = torch.zeros_like(x_BKD)
        if self.row_index.numel():
            y_BKD[self.row_index] = run(x_BKD[self.row_index])
        return y_BKD


def rotate(x_BKHE: Tensor, cos_BKE: Tensor, sin_BKE: Tensor) -> Tensor:
    """Rotary positions on pairs (i, i + E/2), as Llama pairs them."""
    cos, sin = cos_BKE.unsqueeze(2), sin_BKE.unsqueeze(2)
    first, second = x_BKHE.chunk(2, dim=-1)
    return x_BKHE * cos + torch.cat((-second, first), dim=-1) * sin


def repeat_groups(x_BGLE: Tensor, num_heads: int) -> Tensor:
    """(B, H, L, E): each group once for every query head that uses it."""
    groups = x_BGLE.shape[1]
    return x_BGLE if groups == num_heads else x_BGLE.repeat_interleave(num_heads // groups, dim=1)


def attend(query_BHKE: Tensor, key_BGLE: Tensor, value_BGLE: Tensor, scope: AttentionScope, dropout: float) -> Tensor:
    """Scaled dot-product attention with grouped queries; softmax scale E^-0.5. Returns (B, H, K, E)."""
    if scope.key_range is not None:
        return scope.key_range.attend(query_BHKE, key_BGLE, value_BGLE, dropout)
    mask = None if scope.mask_BKL is None else scope.mask_BKL.unsqueeze(1)
    if query_BHKE.is_cuda and query_BHKE.dtype == torch.float32 and mask is None:
        # No fused CUDA kernel takes groups in float32, and without one all scores are written to memory.
        key_BGLE, value_BGLE = (repeat_groups(t, query_BHKE.shape[1]) for t in (key_BGLE, value_BGLE))
    return F.scaled_dot_product_attention(
        query_BHKE,
        key_BGLE,
        value_BGLE,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and scope.is_causal and query_BHKE.shape[2] > 1,
        enable_gqa=query_BHKE.shape[1] != key_BGLE.shape[1],
    )
