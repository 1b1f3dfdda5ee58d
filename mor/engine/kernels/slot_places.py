"""Where the rows of slots find keys and values: the parts of the kernels of slots that fill
`mor.engine.slot_steps.Places`.

Legend: S slots, N rows, C slots that may turn, E head size, L positions, Q virtual sequences, X pages of a
sequence, P entries of a page, A recursions of the block in a visit, R recursions after the first.
"""

from __future__ import annotations

import triton.language as tl

from mor.engine.kernels.launch import kernel


@kernel
def copy_row(source, target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`SIZE` numbers that lie together."""
    place = tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < SIZE), mask=place < SIZE)


@kernel
def _place(
    row,
    number,
    page,
    entry,
    table,
    last,
    cos_LE,
    sin_LE,
    cos_NE,
    sin_NE,
    page_N,
    entry_N,
    table_N,
    last_N,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A row's part of `slot_steps.Places`."""
    copy_row(cos_LE + number * SIZE, cos_NE + row * SIZE, SIZE, BLOCK_E)
    copy_row(sin_LE + number * SIZE, sin_NE + row * SIZE, SIZE, BLOCK_E)
    tl.store(page_N + row, page)
    tl.store(entry_N + row, entry)
    tl.store(table_N + row, table)
    tl.store(last_N + row, last)


@kernel
def _page(tables_SQX, table, entry, writes, nobodys, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    """The page of a sequence's new entry, nobody's if it is not written."""
    page = tl.load(tables_SQX + table * WIDTH + tl.minimum(entry // ENTRIES, WIDTH - 1)).to(tl.int64)
    return tl.where(writes, page, nobodys)


@kernel
def place_outer(
    row,
    slot,
    number,
    part,
    tables_SQX,
    nobodys,
    cos_LE,
    sin_LE,
    cos_CE,
    sin_CE,
    page_C,
    entry_C,
    table_C,
    last_C,
    RECURSIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Places of the unshared layers, which have an entry of every token, at its number, in the last sequence."""
    table = slot * (RECURSIONS + 1) + RECURSIONS
    page = _page(tables_SQX, table, number, part, nobodys, WIDTH, ENTRIES)
    last = tl.where(part, number, -1)
    to = cos_CE, sin_CE, page_C, entry_C, table_C, last_C
    _place(row, number, page, number % ENTRIES, table, last, cos_LE, sin_LE, *to, SIZE, BLOCK_E)


@kernel
def place_block(
    row,
    slot,
    number,
    recursion,
    runs,
    lengths_SQ,
    tables_SQX,
    nobodys,
    cos_LE,
    sin_LE,
    cos_ANE,
    sin_ANE,
    page_AN,
    entry_AN,
    table_AN,
    last_AN,
    recursion_AN,
    overlay_RXP,
    overlay_stride,
    OVERLAYING: tl.constexpr,
    READS_FIRST: tl.constexpr,
    WRITES_OWN: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Places of the block at one recursion, whose sequence grows. What lies over a token's entry of the first: nothing
    when it is new, and then its entries of later recursions."""
    first = slot * SEQUENCES
    have = lengths_SQ + first + recursion
    entry = tl.load(have)
    writes, read, last = runs & ((recursion == 0) | WRITES_OWN), recursion, entry
    if READS_FIRST:
        read, last = recursion * 0, number
    page = _page(tables_SQX, first + recursion, entry, writes, nobodys, WIDTH, ENTRIES)
    tl.debug_barrier()
    tl.store(have, entry + 1, mask=writes)
    to = cos_ANE, sin_ANE, page_AN, entry_AN, table_AN, last_AN
    last = tl.where(runs, last, -1)
    _place(row, number, page, entry % ENTRIES, first + read, last, cos_LE, sin_LE, *to, SIZE, BLOCK_E)
    if OVERLAYING > 0:
        under = _page(tables_SQX, first, number, runs, nobodys, WIDTH, ENTRIES) * ENTRIES + number % ENTRIES
        laid = tl.where(recursion == 0, -1, entry).to(tl.int32)
        for above in tl.static_range(OVERLAYING):  # pyright: ignore
            changes = runs & ((recursion == 0) | (recursion == above + 1))
            tl.store(overlay_RXP + above * overlay_stride + under, laid, mask=changes)
        tl.store(recursion_AN + row, tl.where(runs, recursion, 0))
