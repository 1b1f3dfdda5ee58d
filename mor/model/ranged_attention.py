"""Attention over a range of keys per query: what shared keys and values need, and attention inside documents.

Active tokens stand in causal order, so on shared keys a query sees all up to its own place, and inside documents, which
are runs of neighbours, those from the first of its document. A block of queries therefore sees nothing outside a run of
key blocks, and every key of the blocks between all its first and all its last keys; no pair of tokens is looked at to
find them.

Legend: B rows, T tokens of a row, K queries, L keys, H query heads, G key/value heads, E head size, Q query blocks, N
key blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
FAR = 2**30  # after every key
# For 16-bit heads of 64 on Hopper, where they were measured: 1.4 times the speed of the defaults.
TILES: dict[str, Any] = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 128,
    "bwd_BLOCK_M2": 128,
    "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 4,
    "bwd_num_stages": 3,
}
Blocks = tuple[Tensor, ...]


def document_starts(document_BT: Tensor) -> Tensor:
    """(B, T) the place of the first token of each token's document: of its run of equal numbers."""
    place_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
    return place_BT.masked_fill(~begins_BT, 0).cummax(dim=1).values


class KeyRange:
    """The keys from `first_BK` (None: from the start) to `last_BK` of each query, of L keys.

    Both ascend in each row, but for absent places at its end. What follows from them is made once for all layers.
    """

    def __init__(self, first_BK: Tensor | None, last_BK: Tensor, num_keys: int) -> None:
        self.first_BK, self.last_BK, self.num_keys = first_BK, last_BK, num_keys

    def attend(self, query_BHKE: Tensor, key_BGLE: Tensor, value_BGLE: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention over these keys, (B, H, K, E): block-sparse on CUDA, masked elsewhere and with dropout."""
        if query_BHKE.is_cuda and self.last_BK.shape[1] >= BLOCK and not dropout:
            return _compiled(attend_blocks)(query_BHKE, key_BGLE, value_BGLE, *self.bounds, self.blocks)  # type: ignore
        grouped = query_BHKE.shape[1] != key_BGLE.shape[1]
        return F.scaled_dot_product_attention(
            query_BHKE, key_BGLE, value_BGLE, attn_mask=self.mask_BKL[:, None], dropout_p=dropout, enable_gqa=grouped
        )

    @functools.cached_property
    def mask_BKL(self) -> Tensor:
        """True where query K sees key L."""
        key_L = torch.arange(self.num_keys, device=self.last_BK.device)
        mask_BKL = key_L <= self.last_BK[..., None]
        return mask_BKL if self.first_BK is None else mask_BKL & (key_L >= self.first_BK[..., None])

    @functools.cached_property
    def bounds(self) -> tuple[Tensor | None, Tensor]:
        """`first_BK` and `last_BK`, not expanded: strides of 0 would be compiled on their own."""
        return None if self.first_BK is None else self.first_BK.contiguous(), self.last_BK.contiguous()

    @functools.cached_property
    def blocks(self) -> Blocks:
        """What `visible_blocks` says of these keys."""
        first_BK, last_BK = self.bounds
        first_BK = torch.zeros_like(last_BK) if first_BK is None else first_BK
        return _compiled(visible_blocks, dynamic=True)(first_BK, last_BK, self.num_keys)  # type: ignore[no-any-return]


def attend_blocks(
    query_BHKE: Tensor, key_BGLE: Tensor, value_BGLE: Tensor, first_BK: Tensor | None, last_BK: Tensor, blocks: Blocks
) -> Tensor:
    """The block-sparse twin of the masked attention; `blocks` from `visible_blocks`."""
    lengths = query_BHKE.shape[2], key_BGLE.shape[2]
    mask = BlockMask(lengths, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=_sees(first_BK, last_BK))
    options: Any = TILES if query_BHKE.dtype.itemsize == 2 else None
    out = flex_attention(query_BHKE, key_BGLE, value_BGLE, block_mask=mask, enable_gqa=True, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def visible_blocks(first_BK: Tensor, last_BK: Tensor, num_keys: int) -> Blocks:
    """Which key blocks each query block sees in part and whole, and which query blocks see each key block so: numbers
    and indices for `BlockMask`."""
    num_blocks = -(-num_keys // BLOCK)
    begin_BQ = _by_block(first_BK, FAR).amin(2) // BLOCK
    end_BQ = _by_block(last_BK, -1).amax(2) // BLOCK + 1
    whole_begin_BQ = (_by_block(first_BK, 0).amax(2) + BLOCK - 1) // BLOCK
    whole_end_BQ = (_by_block(last_BK, FAR).amin(2) + 1) // BLOCK
    whole_BQ = (whole_end_BQ - whole_begin_BQ).clamp(min=0)
    before_BQ = torch.where(whole_BQ > 0, whole_begin_BQ, end_BQ) - begin_BQ  # blocks seen in part, before whole ones
    index_N = torch.arange(num_blocks, device=last_BK.device)
    skipped_BQN = torch.where(index_N < before_BQ[..., None], 0, whole_BQ[..., None])
    part_index = begin_BQ[..., None] + index_N + skipped_BQN
    whole_index = whole_begin_BQ[..., None] + index_N
    last_block = num_blocks - 1
    mask = BlockMask.from_kv_blocks(
        (end_BQ - begin_BQ - whole_BQ)[:, None].int(),
        part_index.clamp(max=last_block)[:, None].int(),
        whole_BQ[:, None].int(),
        whole_index.clamp(max=last_block)[:, None].int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_sees(first_BK, last_BK),
        seq_lengths=(last_BK.shape[1], num_keys),
    )
    blocks = (
        (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices),
    )
    return tuple(tensor for group in blocks for tensor in group if tensor is not None)


def _by_block(bound_BK: Tensor, padding: int) -> Tensor:
    """(B, Q, BLOCK), filled up with `padding`, a constant: `F.pad` is compiled again for each value."""
    return F.pad(bound_BK, (0, -bound_BK.shape[1] % BLOCK), value=padding).unflatten(1, (-1, BLOCK))


def _sees(first_BK: Tensor | None, last_BK: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def up_to_last(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= last_BK[row, query]

    def in_range(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert first_BK is not None
        return (key >= first_BK[row, query]) & (key <= last_BK[row, query])

    return up_to_last if first_BK is None else in_range


@functools.cache
def _compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """Compiled for any number of queries, keys and rows (`dynamic`), or for the first numbers and then for any:
    token-choice and warm-ups change them step by step."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic)
