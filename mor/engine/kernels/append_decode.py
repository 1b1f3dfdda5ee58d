"""Decode attention that starts from the fused projection: rotary positions, the write of each row's new key and value,
and attention over the pages, which the new entry ends, in one kernel.

Legend: N rows, C channels of the fused projection, J heads, T rows of the table, X pages, P entries of a page, H query
heads, G key/value heads, E head size, S splits.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mor.engine import plain_ops
from mor.engine.kernels.launch import check_heads, check_projection, check_rows, kernel, runs_kernel
from mor.engine.kernels.paged_decode import SPLIT, attend_entries, fetch_entries, run_splits
from mor.engine.kv_store import Overlay


@kernel
def _rotated(x_NC, cos_E, sin_E, place_JE, is_in_J1, SIZE: tl.constexpr):
    """Heads at `place_JE`, rotated. Rounds after each operation, as tensors of the dtype do."""
    size_E = tl.arange(0, SIZE)[None, :]
    x_JE = tl.load(x_NC + place_JE + size_E, mask=is_in_J1, other=0.0)
    other_JE = tl.load(x_NC + place_JE + (size_E + SIZE // 2) % SIZE, mask=is_in_J1, other=0.0).to(tl.float32)
    other_JE = tl.where(size_E < SIZE // 2, -other_JE, other_JE)
    dtype = x_JE.dtype
    straight_JE = (x_JE.to(tl.float32) * cos_E.to(tl.float32)).to(dtype)
    across_JE = (other_JE * sin_E.to(tl.float32)).to(dtype)
    return (straight_JE.to(tl.float32) + across_JE.to(tl.float32)).to(dtype)


@kernel
def _write_entry(key_E, value_E, new_key_1E, new_value_1E, SIZE: tl.constexpr):
    """A row's new key and value, read by all its threads, so that no read waits for another; then a barrier."""
    size_1E = tl.arange(0, SIZE)[None, :]
    tl.store(key_E + size_1E, new_key_1E)
    tl.store(value_E + size_1E, new_value_1E)
    tl.debug_barrier()


@kernel(do_not_specialize=["num_splits"])
def _attend_new(
    qkv_NC,
    cos_NE,
    sin_NE,
    page_N,
    place_N,
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
    row_stride,
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
    """`attend_entries` with queries still to be rotated. The program of a row's last split first writes the new entry:
    it alone reads it, so a barrier among its own threads is all that must stand between."""
    group, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    strides = page_stride, entry_stride, table_stride, overlay_stride
    if EARLY:
        gdc_launch_dependents()
    if EARLY == 2:
        seen = key_XPGE, value_XPGE, table_TX, row_N, last_N, recursion_N, overlay_RXP
        fetch_entries(*seen, *strides, SIZE, ENTRIES, SPLIT_ENTRIES, LINE)
    if EARLY:
        gdc_wait()
    length = tl.load(last_N + row).to(tl.int32) + 1
    if (split * SPLIT_ENTRIES >= length) & (split > 0):
        return
    size_1E = tl.arange(0, SIZE)[None, :]
    qkv_C = qkv_NC + row * row_stride
    cos_1E, sin_1E = tl.load(cos_NE + row * SIZE + size_1E), tl.load(sin_NE + row * SIZE + size_1E)
    entry = tl.load(page_N + row).to(tl.int64) * page_stride + tl.load(place_N + row).to(tl.int64) * entry_stride
    from_11 = (HEADS + group + tl.arange(0, 1)[:, None]) * SIZE
    key_1E = _rotated(qkv_C, cos_1E, sin_1E, from_11, from_11 >= 0, SIZE)
    value_1E = tl.load(qkv_C + from_11 + HEADS // GROUP * SIZE + size_1E)
    in_group_H1 = tl.arange(0, BLOCK_H)[:, None]
    query_HE = _rotated(qkv_C, cos_1E, sin_1E, (group * GROUP + in_group_H1) * SIZE, in_group_H1 < GROUP, SIZE)
    if (split + 1) * SPLIT_ENTRIES >= length:
        _write_entry(key_XPGE + entry + group * SIZE, value_XPGE + entry + group * SIZE, key_1E, value_1E, SIZE)
    seen, out = (key_XPGE, value_XPGE, table_TX, row_N, recursion_N, overlay_RXP), (out_NHE, part_NSHE, lse_NSH)
    rest = length, scale, page_stride, entry_stride, table_stride, overlay_stride, num_splits
    attend_entries(query_HE, *seen, *out, *rest, HEADS, GROUP, SIZE, ENTRIES, TILE_ENTRIES, SPLIT_ENTRIES, BLOCK_H)


def attend_new(
    qkv_NC: Tensor,
    cos_NE: Tensor,
    sin_NE: Tensor,
    page_N: Tensor,
    place_N: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    row_N: Tensor,
    last_N: Tensor,
    longest: int,
    heads: int,
    overlay: Overlay | None = None,
    *,
    split: int = SPLIT,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    early: bool | None = None,
) -> Tensor:
    """`rotate_and_store` and then `attend_pages` in one kernel, bit for bit: see there.

    A row's new entry at (`page_N`, `place_N`) is either the last one that it sees, `last_N` or what lies over it, or
    one that no row of the call sees, as in a page that belongs to nobody.
    """
    rows, seen = (qkv_NC, cos_NE, sin_NE, page_N, place_N), (key_XPGE, value_XPGE, table_TX, row_N, last_N)
    if not runs_kernel(qkv_NC):
        return plain_ops.attend_new(*rows, *seen, longest, heads, overlay)
    check_projection(qkv_NC, cos_NE, sin_NE, heads, key_XPGE.shape[2])
    check_heads(qkv_NC[:, : heads * cos_NE.shape[1]].unflatten(1, (heads, -1)), key_XPGE, value_XPGE)
    check_rows(qkv_NC, page_N=page_N, place_N=place_N, row_N=row_N, last_N=last_N)
    tuning = split, tile, num_warps, num_stages, early
    return run_splits(_attend_new, rows, qkv_NC.stride(0), seen, overlay, longest, heads, *tuning)
