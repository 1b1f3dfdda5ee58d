"""Attention of some tokens over all tokens at or before them: what a recursion on shared keys and values needs.

The queries stand in causal order, so a block of them sees a run of whole key blocks and a few partial ones; which ones
follows from the smallest and the largest place in the block, without looking at any pair.

Legend: B rows, K queries, L keys, H query heads, G key/value heads, E head size, Q query blocks, N key blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def earlier_mask(place_BK: Tensor, num_keys: int) -> Tensor:
    """(B, K, L) true at the keys at or before each query's place."""
    return torch.arange(num_keys, device=place_BK.device) <= place_BK[..., None]


def attend_earlier(query_BHKE: Tensor, key_BGLE: Tensor, value_BGLE: Tensor, place_BK: Tensor) -> Tensor:
    """Attention over the keys at or before `place_BK`, (B, H, K, E): block-sparse on CUDA, masked elsewhere."""
    if query_BHKE.is_cuda and place_BK.shape[1] >= BLOCK:
        return _compiled()(query_BHKE, key_BGLE, value_BGLE, place_BK)
    mask = earlier_mask(place_BK, key_BGLE.shape[2]).unsqueeze(1)
    grouped = query_BHKE.shape[1] != key_BGLE.shape[1]
    return F.scaled_dot_product_attention(query_BHKE, key_BGLE, value_BGLE, attn_mask=mask, enable_gqa=grouped)


def attend_blocks(query_BHKE: Tensor, key_BGLE: Tensor, value_BGLE: Tensor, place_BK: Tensor) -> Tensor:
    """The block-sparse twin of the masked attention."""
    mask = block_mask(place_BK, key_BGLE.shape[2])
    out = flex_attention(query_BHKE, key_BGLE, value_BGLE, block_mask=mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def block_mask(place_BK: Tensor, num_keys: int) -> BlockMask:
    """Which key blocks each query block sees whole, and which in part."""
    num_blocks = -(-num_keys // BLOCK)
    padding = (0, -place_BK.shape[1] % BLOCK)
    lowest_BQ = F.pad(place_BK, padding, value=num_keys).unflatten(1, (-1, BLOCK)).amin(2)
    highest_BQ = F.pad(place_BK, padding, value=-1).unflatten(1, (-1, BLOCK)).amax(2)
    whole_BQ = (lowest_BQ + 1) // BLOCK
    part_BQ = highest_BQ // BLOCK + 1 - whole_BQ
    index_N = torch.arange(num_blocks, device=place_BK.device)
    whole_index = index_N.expand(*whole_BQ.shape, num_blocks)
    part_index = (index_N + whole_BQ[..., None]).clamp(max=num_blocks - 1)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= place_BK[row, query]

    return BlockMask.from_kv_blocks(
        part_BQ[:, None].int(),
        part_index[:, None].int(),
        whole_BQ[:, None].int(),
        whole_index[:, None].int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(place_BK.shape[1], num_keys),
    )


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(attend_blocks, fullgraph=True, dynamic=False)
