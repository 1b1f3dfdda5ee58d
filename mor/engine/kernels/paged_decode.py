"""Attention of single rows over the pages of virtual sequences, with grouped queries: the decode kernel.

A row's entries are cut into splits of a fixed number, whatever else is in the batch, so a row's result depends on
itself alone, and on whether there are more than `VERY_FEW_ROWS`. A split reads its keys and values once for all query
heads of a group, as in Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html); a second, small kernel
joins the splits of rows that have several by their log-sum-exp.

Legend: N rows, T rows of the table, X pages, P entries of a page, H query heads, G key/value heads, E head size, S
splits, L entries of a tile, K splits joined at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mor.engine import plain_ops
from mor.engine.kernels.launch import (
    VERY_FEW_ROWS,
    check_heads,
    check_rows,
    kernel,
    overlay_of,
    runs_kernel,
    starts_early,
)
from mor.engine.kernels.places import place_entries
from mor.engine.kv_store import Overlay

SPLIT = 512
"""Entries of a split. Rounding depends on it, so all calls whose results are to be equal use the same."""

TILE = 64
"""Entries that a program reads at a time; as for splits."""

NUM_WARPS = 2
"""Sums of several warps are rounded in another order, so this is one number for any batch too."""

WIDE_BYTES = 32768
"""Keys of a program's tile where there are very few rows: with a multiprocessor to itself, a program waits for one tile
after the other more than for memory."""

WIDEST, WIDE_WARPS = 256, 4

NUM_STAGES = 2
FEW_STAGES = 3
"""Tiles and pages on their way; the second where there are at most `FEW_PROGRAMS`, each with a multiprocessor's memory
nearly to itself. Changes no rounding."""

FEW_PROGRAMS = 264

FEW_REGISTERS = 96
"""A thread's, where rows have one split: ten programs then fit a multiprocessor instead of eight, and 256 short rows
one wave. With several splits it costs more than it gives. Changes no rounding."""

_JOINED, _JOIN_WARPS = 8, 2  # splits that a program of the second kernel reads at a time
_LOG2E = 1.4426950408889634


@kernel
def fetch_entries(
    key_XPGE,
    value_XPGE,
    table_TX,
    row_N,
    last_N,
    recursion_N,
    overlay_RXP,
    page_stride,
    entry_stride,
    table_stride,
    overlay_stride,
    SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPLIT_ENTRIES: tl.constexpr,
    LINE: tl.constexpr,
):
    """Starts moving a split's keys and values to the L2 cache; nobody waits for them here. What is read to find them
    may still be about to change, so it is used for nothing else."""
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    last = tl.maximum(tl.load(last_N + row).to(tl.int32), 0)
    pages = table_TX + tl.load(row_N + row).to(tl.int64) * table_stride
    over = recursion_N, overlay_RXP
    strides = page_stride, entry_stride, table_stride, overlay_stride
    entry_L = tl.minimum(split * SPLIT_ENTRIES + tl.arange(0, SPLIT_ENTRIES), last)
    place_L = place_entries(pages, entry_L, entry_L >= 0, row, *over, *strides, ENTRIES) + group * SIZE
    for first in tl.static_range(0, SIZE, LINE):  # pyright: ignore
        _fetch(key_XPGE + place_L + first)
        _fetch(value_XPGE + place_L + first)


@kernel
def _fetch(where_L):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [where_L.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@kernel
def attend_entries(
    query_HE,
    key_XPGE,
    value_XPGE,
    table_TX,
    row_N,
    recursion_N,
    overlay_RXP,
    out_NHE,
    part_NSHE,
    lse_NSH,
    length,
    scale,
    page_stride,
    entry_stride,
    table_stride,
    overlay_stride,
    num_splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILE_ENTRIES: tl.constexpr,
    SPLIT_ENTRIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A key/value head's group of query heads over one split of one row. Writes the output if that is all there is."""
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = split * SPLIT_ENTRIES
    stop = tl.minimum(start + SPLIT_ENTRIES, length)
    size_E, in_group_H = tl.arange(0, SIZE), tl.arange(0, BLOCK_H)
    is_head = in_group_H < GROUP
    head_HE = (group * GROUP + in_group_H)[:, None] * SIZE + size_E[None, :]
    pages = table_TX + tl.load(row_N + row).to(tl.int64) * table_stride
    over = recursion_N, overlay_RXP
    strides = page_stride, entry_stride, table_stride, overlay_stride
    largest_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total_H = tl.zeros([BLOCK_H], tl.float32)
    sum_HE = tl.zeros([BLOCK_H, SIZE], tl.float32)
    for first in range(start, stop, TILE_ENTRIES):
        entry_L = first + tl.arange(0, TILE_ENTRIES)
        is_seen_L = entry_L < stop
        place_L = place_entries(pages, entry_L, is_seen_L, row, *over, *strides, ENTRIES) + group * SIZE
        place_LE = place_L[:, None] + size_E[None, :]
        key_LE = tl.load(key_XPGE + place_LE, mask=is_seen_L[:, None], other=0.0)
        value_LE = tl.load(value_XPGE + place_LE, mask=is_seen_L[:, None], other=0.0)
        score_HL = tl.dot(query_HE, tl.trans(key_LE), input_precision="ieee") * scale
        score_HL = tl.where(is_seen_L[None, :], score_HL, float("-inf"))
        peak_H = tl.maximum(largest_H, tl.max(score_HL, 1))
        weight_HL = tl.exp2(score_HL - peak_H[:, None])
        decay_H = tl.exp2(largest_H - peak_H)
        total_H = total_H * decay_H + tl.sum(weight_HL, 1)
        weight_HL = weight_HL.to(value_LE.dtype)
        sum_HE = tl.dot(weight_HL, value_LE, sum_HE * decay_H[:, None], input_precision="ieee")
        largest_H = peak_H
    mean_HE = sum_HE / tl.where(total_H > 0, total_H, 1.0)[:, None]
    if length <= SPLIT_ENTRIES:
        out = out_NHE + row * HEADS * SIZE
        tl.store(out + head_HE, mean_HE.to(out_NHE.dtype.element_ty), mask=is_head[:, None])
    else:
        place = (row * num_splits + split) * HEADS
        tl.store(part_NSHE + place * SIZE + head_HE, mean_HE, mask=is_head[:, None])
        tl.store(lse_NSH + place + group * GROUP + in_group_H, largest_H + tl.log2(total_H), mask=is_head)


@kernel(do_not_specialize=["num_splits"])
def _attend_split(
    query_NHE,
    key_XPGE,
    value_XPGE,
    table_TX,
    row_N,
    last_N,
    recursion_N,
    overlay_RXP,
    out_NHE,
    part_NSHE,
    lse_NSH,
    scale,
    query_stride,
    page_stride,
    entry_stride,
    table_stride,
    overlay_stride,
    num_splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILE_ENTRIES: tl.constexpr,
    SPLIT_ENTRIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
    LINE: tl.constexpr,
):
    """`attend_entries` with queries as they are given."""
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(last_N + row).to(tl.int32) + 1
    if (split * SPLIT_ENTRIES >= length) & (split > 0):
        return
    in_group_H = tl.arange(0, BLOCK_H)[:, None]
    head_HE = (group * GROUP + in_group_H) * SIZE + tl.arange(0, SIZE)[None, :]
    query_HE = tl.load(query_NHE + row * query_stride + head_HE, mask=in_group_H < GROUP, other=0.0)
    attend_entries(
        query_HE,
        key_XPGE,
        value_XPGE,
        table_TX,
        row_N,
        recursion_N,
        overlay_RXP,
        out_NHE,
        part_NSHE,
        lse_NSH,
        length,
        scale,
        page_stride,
        entry_stride,
        table_stride,
        overlay_stride,
        num_splits,
        HEADS,
        GROUP,
        SIZE,
        ENTRIES,
        TILE_ENTRIES,
        SPLIT_ENTRIES,
        BLOCK_H,
    )


@kernel(do_not_specialize=["num_splits"])
def _join_splits(
    part_NSHE,
    lse_NSH,
    last_N,
    out_NHE,
    num_splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SPLIT_ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A group of one row. Splits are added in blocks of a fixed number, so that `num_splits` changes no rounding."""
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    last = tl.load(last_N + row).to(tl.int32)
    if last < SPLIT_ENTRIES:
        return
    used = last // SPLIT_ENTRIES + 1
    size_E, in_group_H = tl.arange(0, SIZE), tl.arange(0, BLOCK_H)
    head_H, is_head_H = group * GROUP + in_group_H, in_group_H < GROUP
    largest_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total_H = tl.zeros([BLOCK_H], tl.float32)
    sum_HE = tl.zeros([BLOCK_H, SIZE], tl.float32)
    for first in range(0, used, BLOCK_K):
        split_K = first + tl.arange(0, BLOCK_K)
        place_KH = (row * num_splits + split_K)[:, None] * HEADS + head_H[None, :]
        is_in_KH = (split_K < used)[:, None] & is_head_H[None, :]
        lse_KH = tl.load(lse_NSH + place_KH, mask=is_in_KH, other=float("-inf"))
        place_KHE = place_KH[:, :, None] * SIZE + size_E[None, None, :]
        part_KHE = tl.load(part_NSHE + place_KHE, mask=is_in_KH[:, :, None], other=0.0)
        peak_H = tl.where(is_head_H, tl.maximum(largest_H, tl.max(lse_KH, 0)), 0.0)
        decay_H, weight_KH = tl.exp2(largest_H - peak_H), tl.exp2(lse_KH - peak_H[None, :])
        total_H = total_H * decay_H + tl.sum(weight_KH, 0)
        sum_HE = sum_HE * decay_H[:, None] + tl.sum(part_KHE * weight_KH[:, :, None], 0)
        largest_H = peak_H
    out_HE = out_NHE + (row * HEADS + head_H)[:, None] * SIZE + size_E[None, :]
    mean_HE = sum_HE / tl.where(is_head_H, total_H, 1.0)[:, None]
    tl.store(out_HE, mean_HE.to(out_NHE.dtype.element_ty), mask=is_head_H[:, None])


def attend_pages(
    query_NHE: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    row_N: Tensor,
    last_N: Tensor,
    longest: int,
    overlay: Overlay | None = None,
    *,
    split: int = SPLIT,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    early: bool | None = None,
) -> Tensor:
    """The heads' outputs (N, H, E) of rows that see entries 0..`last_N` of the pages `table_TX[row_N]`, or what lies
    over them.

    A row of `last_N` -1 sees nothing and gives zeros. `longest`: a bound on every row's number of entries, known to
    the host; it sets the size of the grid and changes no result. Keys and values are views of one pool. `split` (a
    multiple of `tile`), `tile` and the rest are for tuning; all but `num_stages` change the rounding. Softmax scale
    E^-0.5. Raises ValueError for what the kernel cannot read.
    """
    if not runs_kernel(query_NHE):
        return plain_ops.attend_pages(query_NHE, key_XPGE, value_XPGE, table_TX, row_N, last_N, longest, overlay)
    check_heads(query_NHE, key_XPGE, value_XPGE)
    check_rows(query_NHE, row_N=row_N, last_N=last_N)
    seen, tuning = (key_XPGE, value_XPGE, table_TX, row_N, last_N), (split, tile, num_warps, num_stages, early)
    return run_splits(
        _attend_split, (query_NHE,), query_NHE.stride(0), seen, overlay, longest, query_NHE.shape[1], *tuning
    )


def run_splits(
    attend: Any,
    rows: tuple[Tensor, ...],
    row_stride: int,
    seen: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    overlay: Overlay | None,
    longest: int,
    heads: int,
    split: int,
    tile: int | None,
    num_warps: int | None,
    num_stages: int | None,
    early: bool | None,
) -> Tensor:
    """The heads' outputs (N, H, E) by a kernel over splits of rows that begin `row_stride` apart, its splits joined.

    `seen`: keys, values, table, each row's row of it and last entry. Raises ValueError for a table that cannot be read,
    and for tiles that cannot fill splits.
    """
    key_XPGE, _, table_TX, _, last_N = seen
    usual_tile, usual_warps = _tiling(len(last_N), key_XPGE)
    tile = usual_tile if tile is None else tile
    if table_TX.stride(1) != 1:
        raise ValueError(f"a table of strides {table_TX.stride()} does not hold a row's pages one after another")
    if tile < 16 or tile & (tile - 1) or split % tile:
        raise ValueError(f"tile={tile} must be a power of two, at least 16, that divides split={split}")
    num_rows, (entries, groups, size), num_splits = len(last_N), key_XPGE.shape[1:], max(1, -(-longest // split))
    out_NHE = torch.empty(num_rows, heads, size, device=last_N.device, dtype=key_XPGE.dtype)
    shape = (num_rows, num_splits, heads) if num_splits > 1 else (0, 0, heads)
    part_NSHE = torch.empty(*shape, size, device=last_N.device, dtype=torch.float32)
    lse_NSH = torch.empty(shape, device=last_N.device, dtype=torch.float32)
    if not num_rows:
        return out_NHE
    group = heads // groups
    shared = dict(HEADS=heads, GROUP=group, SIZE=size, SPLIT_ENTRIES=split)
    over, overlay_stride = overlay_of(overlay, last_N, key_XPGE)
    strides = row_stride, *key_XPGE.stride()[:2], table_TX.stride(0), overlay_stride
    is_few = num_rows * groups * num_splits <= FEW_PROGRAMS
    fits_split = num_splits == 1
    early = starts_early(last_N) and fits_split if early is None else early
    attend[(groups, num_splits, num_rows)](
        *(*rows, *seen, *over, out_NHE, part_NSHE, lse_NSH, _LOG2E / size**0.5, *strides, num_splits),
        **shared,
        ENTRIES=entries,
        TILE_ENTRIES=tile,
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        EARLY=early * (1 + is_few),
        LINE=128 // key_XPGE.element_size(),
        launch_pdl=early,
        maxnreg=FEW_REGISTERS if fits_split and not is_few else None,
        num_warps=num_warps or usual_warps,
        num_stages=num_stages or (FEW_STAGES if is_few else NUM_STAGES),
        enable_fp_fusion=False,  # a fused multiply-add rounds once where rotating must round twice
    )
    if num_splits > 1:
        _join_splits[(groups, num_rows)](
            *(part_NSHE, lse_NSH, last_N, out_NHE, num_splits),
            **shared,
            BLOCK_K=_JOINED,
            BLOCK_H=triton.next_power_of_2(group),
            EARLY=early,
            launch_pdl=early,
            num_warps=_JOIN_WARPS,
        )
    return out_NHE


def _tiling(num_rows: int, key_XPGE: Tensor) -> tuple[int, int]:
    """Entries of a tile, and warps of a program."""
    if num_rows > VERY_FEW_ROWS:
        return TILE, NUM_WARPS
    return max(TILE, min(WIDEST, WIDE_BYTES // (key_XPGE.shape[3] * key_XPGE.element_size()))), WIDE_WARPS
