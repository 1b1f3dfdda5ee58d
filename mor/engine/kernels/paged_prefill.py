"""Attention of the rows of prompt chunks over the pages of virtual sequences, with grouped queries.

Rows of a chunk stand together, belong to one sequence and see its entries up to a last one of their own, so a router
may have left any of a chunk's tokens out. A program takes a tile of rows with all query heads of a group and goes over
the entries once (FlashAttention, arXiv 2205.14135).

Legend: M rows, W tiles, T rows of the table, X pages, P entries of a page, H query heads, G key/value heads, E head
size, L entries of a block, R a tile's rows times a group's heads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.engine.kernels.launch import check_heads, check_rows, kernel, overlay_of, runs_kernel
from mor.engine.kernels.places import place_entries
from mor.engine.kv_store import Overlay, Reading

TILE_ROWS = 42
"""Most rows of a tile: with three query heads to a group they fill 126 of 128 rows of a matrix product."""

BLOCK_ENTRIES = 64
NUM_WARPS = 8
NUM_STAGES = 5
_LOG2E = 1.4426950408889634


def cut_tiles(
    starts: npt.ArrayLike, stops: npt.ArrayLike, table_rows: npt.ArrayLike, tile_rows: int = TILE_ROWS
) -> npt.NDArray[np.int32]:
    """Tiles (W, 3) of spans of rows `starts`..`stops` (exclusive): first row, number of rows, row of the table.

    A span that fits no single tile is cut into as few as possible, each full but the last. Empty spans have none.
    """
    start, stop, row = (np.asarray(each, dtype=np.int32) for each in (starts, stops, table_rows))
    if tile_rows < 1 or (stop < start).any():
        raise ValueError(f"tiles of {tile_rows} rows cannot cover spans {start.tolist()} to {stop.tolist()}")
    count = -(-(stop - start) // tile_rows)
    span = np.repeat(np.arange(len(start)), count)
    number = np.arange(len(span)) - np.repeat(np.cumsum(count) - count, count)
    first = start[span] + number * tile_rows
    return np.stack((first, np.minimum(tile_rows, stop[span] - first), row[span]), axis=1).astype(np.int32)


@kernel(do_not_specialize=["table_stride"])
def _attend_tile(
    query_MHE,
    key_XPGE,
    value_XPGE,
    table_TX,
    tile_W3,
    last_M,
    recursion_M,
    overlay_RXP,
    out_MHE,
    scale,
    query_stride,
    page_stride,
    entry_stride,
    table_stride,
    overlay_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """A key/value head's group of query heads over all entries that a tile's rows see."""
    group, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_row = tl.load(tile_W3 + tile * 3).to(tl.int64)
    count = tl.load(tile_W3 + tile * 3 + 1).to(tl.int32)
    if count <= 0:
        return
    pages = table_TX + tl.load(tile_W3 + tile * 3 + 2).to(tl.int64) * table_stride
    size_E, flat_R = tl.arange(0, SIZE), tl.arange(0, BLOCK_R)
    row_R, head_R = first_row + flat_R // GROUP, group * GROUP + flat_R % GROUP
    is_row_R = flat_R < count * GROUP
    last_R = tl.load(last_M + row_R, mask=is_row_R, other=-1).to(tl.int32)
    query_RE = tl.load(
        query_MHE + (row_R * query_stride + head_R * SIZE)[:, None] + size_E[None, :], mask=is_row_R[:, None], other=0.0
    )
    stop = tl.max(last_R, 0) + 1
    over = first_row, recursion_M, overlay_RXP
    strides = page_stride, entry_stride, table_stride, overlay_stride
    largest_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total_R = tl.zeros([BLOCK_R], tl.float32)
    sum_RE = tl.zeros([BLOCK_R, SIZE], tl.float32)
    for first in range(0, stop, BLOCK_L):
        entry_L = first + tl.arange(0, BLOCK_L)
        is_seen_L = entry_L < stop
        place_L = place_entries(pages, entry_L, is_seen_L, *over, *strides, ENTRIES) + group * SIZE
        place_LE = place_L[:, None] + size_E[None, :]
        key_LE = tl.load(key_XPGE + place_LE, mask=is_seen_L[:, None], other=0.0)
        value_LE = tl.load(value_XPGE + place_LE, mask=is_seen_L[:, None], other=0.0)
        score_RL = tl.dot(query_RE, tl.trans(key_LE), input_precision="ieee") * scale
        score_RL = tl.where(entry_L[None, :] <= last_R[:, None], score_RL, float("-inf"))
        peak_R = tl.maximum(largest_R, tl.max(score_RL, 1))
        zero_R = tl.where(peak_R == float("-inf"), 0.0, peak_R)  # rows that see nothing yet: no infinity less itself
        weight_RL = tl.exp2(score_RL - zero_R[:, None])
        decay_R = tl.exp2(largest_R - zero_R)
        total_R = total_R * decay_R + tl.sum(weight_RL, 1)
        sum_RE = tl.dot(weight_RL.to(value_LE.dtype), value_LE, sum_RE * decay_R[:, None], input_precision="ieee")
        largest_R = peak_R
    mean_RE = sum_RE / tl.where(total_R > 0, total_R, 1.0)[:, None]
    out_RE = out_MHE + (row_R * HEADS + head_R)[:, None] * SIZE + size_E[None, :]
    tl.store(out_RE, mean_RE.to(out_MHE.dtype.element_ty), mask=is_row_R[:, None])


def attend_spans(
    query_MHE: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    tile_W3: Tensor,
    last_M: Tensor,
    overlay: Overlay | None = None,
    *,
    tile_rows: int = TILE_ROWS,
    block: int = BLOCK_ENTRIES,
    num_warps: int = NUM_WARPS,
    num_stages: int = NUM_STAGES,
) -> Tensor:
    """The heads' outputs (M, H, E) of rows that see entries 0..`last_M` of their sequence's pages, or what lies over
    them: the rows of a tile are at one recursion.

    `tile_W3`: `cut_tiles` of the spans with the same `tile_rows`; tiles of no rows are skipped. Within a tile `last_M`
    may be anything, but rows that see as much as their neighbours waste least. -1 sees nothing: such rows, and those
    of no tile, give zeros. Keys and values are views of one pool. Softmax scale E^-0.5. The rest is for tuning; of it,
    `block` changes the rounding. Raises ValueError for what the kernel cannot read.
    """
    if not runs_kernel(query_MHE):
        return attend_spans_plain(query_MHE, key_XPGE, value_XPGE, table_TX, tile_W3, last_M, overlay)
    check_heads(query_MHE, key_XPGE, value_XPGE)
    check_rows(query_MHE, last_M=last_M)
    if table_TX.stride(1) != 1 or not tile_W3.is_contiguous() or tile_W3.shape[1] != 3:
        strides = table_TX.stride(), tile_W3.stride()
        raise ValueError(f"a table of strides {strides[0]} or tiles of strides {strides[1]} are not laid out by rows")
    if block < 16 or block & (block - 1):
        raise ValueError(f"block={block} must be a power of two, at least 16")
    (num_rows, heads, size), (entries, groups) = query_MHE.shape, key_XPGE.shape[1:3]
    out_MHE = torch.zeros(num_rows, heads, size, device=query_MHE.device, dtype=query_MHE.dtype)
    if not len(tile_W3):
        return out_MHE
    over, overlay_stride = overlay_of(overlay, last_M, key_XPGE)
    _attend_tile[(groups, len(tile_W3))](
        query_MHE,
        key_XPGE,
        value_XPGE,
        table_TX,
        tile_W3,
        last_M,
        *over,
        out_MHE,
        _LOG2E / size**0.5,
        query_MHE.stride(0),
        key_XPGE.stride(0),
        key_XPGE.stride(1),
        table_TX.stride(0),
        overlay_stride,
        HEADS=heads,
        GROUP=heads // groups,
        SIZE=size,
        ENTRIES=entries,
        BLOCK_R=max(16, triton.next_power_of_2(tile_rows * (heads // groups))),
        BLOCK_L=block,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out_MHE


def attend_spans_plain(
    query_MHE: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    tile_W3: Tensor,
    last_M: Tensor,
    overlay: Overlay | None = None,
) -> Tensor:
    """What `attend_spans` computes, in float32 and tile by tile. Reads the tiles on the host."""
    heads, size = query_MHE.shape[1:]
    entries, groups = key_XPGE.shape[1:3]
    out_MHE = torch.zeros_like(query_MHE, memory_format=torch.contiguous_format)
    for first, count, table_row in tile_W3.tolist():
        rows = slice(first, first + count)
        stop = int(last_M[rows].max()) + 1 if count > 0 else 0
        if not stop:
            continue
        over = None if overlay is None else overlay._replace(recursion_N=overlay.recursion_N[first : first + 1])
        row_1, stop_1 = (torch.tensor([number], device=query_MHE.device) for number in (table_row, stop))
        reading = Reading.of(table_TX, row_1, -(-stop // entries), stop_1, over)
        key_LGE, value_LGE = (reading(pages)[0, :stop].float() for pages in (key_XPGE, value_XPGE))
        seen_ML = torch.arange(stop, device=query_MHE.device) <= last_M[rows, None]
        query_MGJE = query_MHE[rows].float().unflatten(1, (groups, heads // groups))
        score_MGJL = torch.einsum("mgje,lge->mgjl", query_MGJE, key_LGE) * size**-0.5
        weight_MGJL = score_MGJL.masked_fill(~seen_ML[:, None, None], float("-inf")).softmax(-1).nan_to_num(nan=0)
        out_MGJE = torch.einsum("mgjl,lge->mgje", weight_MGJL, value_LGE)
        out_MHE[rows] = out_MGJE.flatten(1, 2).to(out_MHE.dtype)
    return out_MHE
