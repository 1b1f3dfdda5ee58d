"""Where the entries that a row reads lie: in its pages, or where entries of its own recursion lie over them.

Legend: N rows, R recursions, X pages, P entries of a page, L entries.
"""

from __future__ import annotations

import triton.language as tl

from mor.engine.kernels.launch import kernel


@kernel
def place_entries(
    pages_X,
    entry_L,
    is_read_L,
    row,
    recursion_N,
    overlay_RXP,
    page_stride,
    entry_stride,
    table_stride,
    overlay_stride,
    ENTRIES: tl.constexpr,
):
    """How far into the pool entries of a row's pages begin. Without an overlay (None) its two loads are not there."""
    page_L = tl.load(pages_X + entry_L // ENTRIES, mask=is_read_L, other=0).to(tl.int64)
    in_page_L = entry_L % ENTRIES
    if overlay_RXP is not None:
        recursion = tl.load(recursion_N + row).to(tl.int64)
        over = overlay_RXP + (recursion - 1) * overlay_stride
        own_L = tl.load(over + page_L * ENTRIES + in_page_L, mask=is_read_L & (recursion > 0), other=-1)
        own_pages_X = pages_X + recursion * table_stride
        page_L = tl.where(
            own_L >= 0, tl.load(own_pages_X + own_L // ENTRIES, mask=own_L >= 0, other=0).to(tl.int64), page_L
        )
        in_page_L = tl.where(own_L >= 0, own_L % ENTRIES, in_page_L)
    return page_L * page_stride + in_page_L * entry_stride
