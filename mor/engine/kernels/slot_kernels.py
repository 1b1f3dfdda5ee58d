"""The kernels of `mor.engine.kernels.slot_steps`, each a step of a visit between its layers.

A program has one slot, or one place of those that turn. Nothing in it waits for another program's result: who turns is
counted by every program for itself, from the columns of all slots, which lie together. Reads that its own writes would
change stand before a barrier, as every warp of a program reads for itself.

Legend: S slots, N slots of the visit, C slots that may turn in it, D hidden size, E head size, V vocabulary, Q virtual
sequences, X pages of a sequence, P entries of a page, I columns of integers, F columns of floats, A recursions of the
block in a visit, R recursions after the first.
"""

from __future__ import annotations

import triton.language as tl

from mor.engine.kernels.launch import kernel
from mor.engine.kernels.slot_places import copy_row, place_block, place_outer
from mor.engine.slot_state import BROKEN, NUM_STOPS, RESTING, Float, Int, Report

_TOKEN, _NUMBER, _RECURSION, _ACTIVE = (
    tl.constexpr(int(c)) for c in (Int.TOKEN, Int.NUMBER, Int.RECURSION, Int.ACTIVE)
)
_DEPTH, _LIVE, _FRESH, _MADE, _LEFT = (
    tl.constexpr(int(c)) for c in (Int.DEPTH, Int.LIVE, Int.FRESH, Int.MADE, Int.LEFT)
)
_TARGET, _STOPS, _GATE = (tl.constexpr(int(c)) for c in (Int.TARGET, Int.STOPS, Float.GATE))
_NUM_STOPS, _NUM_REPORTS = tl.constexpr(NUM_STOPS), tl.constexpr(len(Report))
_RESTING, _BROKEN = tl.constexpr(RESTING), tl.constexpr(BROKEN)


@kernel(do_not_specialize=["num_slots", "num_turns", "nobody", "nobodys"])
def turn_kernel(
    ints_IS,
    floats_SF,
    stream_SD,
    tables_SQX,
    cos_LE,
    sin_LE,
    slot_C,
    place_N,
    ints_CI,
    floats_CF,
    x_CD,
    cos_CE,
    sin_CE,
    page_C,
    entry_C,
    table_C,
    last_C,
    num_slots,
    num_turns,
    nobody,
    nobodys,
    column,
    ALL: tl.constexpr,
    NUM_INTS: tl.constexpr,
    NUM_FLOATS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RECURSIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The place of one slot, and the slot of one place."""
    row = tl.program_id(0).to(tl.int64)
    live, recursion = tl.load(ints_IS + _LIVE * column + row), tl.load(ints_IS + _RECURSION * column + row)
    rests = (live > 0) & (recursion == _RESTING)
    if ALL:
        place, slot = row, tl.where(rests, row, nobody)
    else:
        number_N = tl.arange(0, BLOCK_N)
        is_slot_N = number_N < num_slots
        live_N = tl.load(ints_IS + _LIVE * column + number_N, mask=is_slot_N, other=0)
        recursion_N = tl.load(ints_IS + _RECURSION * column + number_N, mask=is_slot_N, other=0)
        rests_N = ((live_N > 0) & (recursion_N == _RESTING)).to(tl.int32)
        place = tl.sum(tl.where(number_N < row, rests_N, 0), 0).to(tl.int64)
        slot = tl.sum(((tl.cumsum(rests_N, 0) <= row) & is_slot_N).to(tl.int32), 0).to(tl.int64)
        slot = tl.where(slot < num_slots, slot, nobody)
    tl.store(place_N + row, tl.where(rests & (place < num_turns), place, -1))
    if row < num_turns:
        tl.store(slot_C + row, slot)
        column_I, column_F = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_F)
        int_I = tl.load(ints_IS + column_I * column + slot, mask=column_I < NUM_INTS)
        tl.store(ints_CI + row * NUM_INTS + column_I, int_I, mask=column_I < NUM_INTS)
        float_F = tl.load(floats_SF + slot * NUM_FLOATS + column_F, mask=column_F < NUM_FLOATS)
        tl.store(floats_CF + row * NUM_FLOATS + column_F, float_F, mask=column_F < NUM_FLOATS)
        copy_row(stream_SD + slot * HIDDEN, x_CD + row * HIDDEN, HIDDEN, BLOCK_D)
        if ENTRIES > 0:
            samples = (slot != nobody) & (tl.load(ints_IS + _FRESH * column + slot) == 0)
            number = tl.load(ints_IS + _NUMBER * column + slot)
            known = tables_SQX, nobodys, cos_LE, sin_LE
            to = cos_CE, sin_CE, page_C, entry_C, table_C, last_C
            place_outer(row, slot, number, samples, *known, *to, RECURSIONS, WIDTH, ENTRIES, SIZE, BLOCK_E)


@kernel(do_not_specialize=["nobody", "nobodys"])
def advance_kernel(
    ints_CI,
    slot_C,
    token_C,
    logprob_C,
    embedding_VD,
    reports_K3S,
    visit_1,
    lengths_SQ,
    tables_SQX,
    cos_LE,
    sin_LE,
    x_CD,
    cos_CE,
    sin_CE,
    page_C,
    entry_C,
    table_C,
    last_C,
    nobody,
    nobodys,
    NUM_INTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RECURSIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One place of those that turn."""
    row = tl.program_id(0).to(tl.int64)
    slot, token, ints = tl.load(slot_C + row), tl.load(token_C + row), ints_CI + row * NUM_INTS
    turns = slot != nobody
    samples = turns & (tl.load(ints + _FRESH) == 0)
    report = reports_K3S + tl.load(visit_1) * _NUM_REPORTS * (nobody + 1) + slot
    tl.store(report, tl.where(token < 0, _BROKEN, token).to(tl.int32), mask=samples)
    tl.store(report + (nobody + 1), tl.load(ints + _DEPTH).to(tl.int32), mask=samples)
    logprob = tl.load(logprob_C + row).to(tl.float32)
    tl.store(report + 2 * (nobody + 1), logprob.to(tl.int32, bitcast=True), mask=samples)
    is_stop = (tl.sum((tl.load(ints + _STOPS + tl.arange(0, _NUM_STOPS)) == token).to(tl.int32), 0) > 0) | (token < 0)
    left, number = tl.load(ints + _LEFT) - samples, tl.load(ints + _NUMBER) + samples
    live = turns & ((samples == 0) | ((is_stop == 0) & (left > 0)))
    made, old = tl.load(ints + _MADE) + samples, tl.load(ints + _TOKEN)
    token = tl.maximum(tl.where(samples, token, old), 0)
    copy_row(embedding_VD + token * HIDDEN, x_CD + row * HIDDEN, HIDDEN, BLOCK_D)
    tl.debug_barrier()
    tl.store(ints + _TOKEN, token)
    tl.store(ints + _NUMBER, number)
    tl.store(ints + _LIVE, live.to(tl.int64))
    tl.store(ints + _FRESH, number * 0)
    tl.store(ints + _MADE, made)
    tl.store(ints + _LEFT, left)
    tl.store(ints + _DEPTH, number * 0)
    if ENTRIES > 0:
        tl.store(lengths_SQ + slot * (RECURSIONS + 1) + RECURSIONS, number + 1, mask=live)
        known = tables_SQX, nobodys, cos_LE, sin_LE
        to = cos_CE, sin_CE, page_C, entry_C, table_C, last_C
        place_outer(row, slot, number, live, *known, *to, RECURSIONS, WIDTH, ENTRIES, SIZE, BLOCK_E)


@kernel
def _returned(
    ints_I, row, taken, target, RUNS_ALL: tl.constexpr, column, NUM_INTS: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Put a slot's integers back at `row`, with the first decision. Its number, its recursion, and whether it runs."""
    column_I = tl.arange(0, BLOCK_I)
    number, runs = tl.load(ints_I + _NUMBER), (tl.load(ints_I + _LIVE) > 0) & ((taken > 0) | RUNS_ALL)
    recursion = tl.where(runs, number * 0, _RESTING)
    int_I = tl.load(ints_I + column_I, mask=column_I < NUM_INTS)
    int_I = tl.where(column_I == _RECURSION, recursion, int_I)
    int_I = tl.where(column_I == _ACTIVE, taken, int_I)
    int_I = tl.where(column_I == _TARGET, target, int_I)
    tl.debug_barrier()
    tl.store(row + column_I * column, int_I, mask=column_I < NUM_INTS)
    return number, recursion, runs


@kernel(do_not_specialize=["nobodys"])
def enter_kernel(
    place_N,
    ints_CI,
    x_CD,
    taken_C,
    gate_C,
    target_C,
    ints_IS,
    floats_SF,
    stream_SD,
    x_SD,
    lengths_SQ,
    tables_SQX,
    cos_LE,
    sin_LE,
    y_ND,
    cos_ANE,
    sin_ANE,
    page_AN,
    entry_AN,
    table_AN,
    last_AN,
    recursion_AN,
    overlay_RXP,
    nobodys,
    column,
    overlay_stride,
    READS_FIRST: tl.constexpr,
    WRITES_OWN: tl.constexpr,
    OVERLAYING: tl.constexpr,
    TAKEN: tl.constexpr,
    NUM_INTS: tl.constexpr,
    NUM_FLOATS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One slot: what became of it, if it turned, and where the block finds its keys and values."""
    slot, num_slots = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    number, recursion = tl.load(ints_IS + _NUMBER * column + slot), tl.load(ints_IS + _RECURSION * column + slot)
    runs = (recursion >= 0) & (tl.load(ints_IS + _LIVE * column + slot) > 0)
    x_D, place = x_SD + slot * HIDDEN, slot * 0 - 1
    if place_N is not None:
        place = tl.load(place_N + slot)
        if place >= 0:
            x_D = x_CD + place * HIDDEN
            taken, target = tl.load(taken_C + place).to(tl.int64), tl.load(target_C + place)
            chosen = taken, target, READS_FIRST
            ints, row = ints_CI + place * NUM_INTS, ints_IS + slot
            number, recursion, runs = _returned(ints, row, *chosen, column, NUM_INTS, BLOCK_I)
            tl.store(floats_SF + slot * NUM_FLOATS + _GATE, tl.load(gate_C + place).to(tl.float64))
            copy_row(x_D, stream_SD + slot * HIDDEN, HIDDEN, BLOCK_D)
            copy_row(x_D, x_SD + slot * HIDDEN, HIDDEN, BLOCK_D)
    copy_row(x_D, y_ND + slot * HIDDEN, HIDDEN, BLOCK_D)
    for each in tl.static_range(TAKEN):  # pyright: ignore
        own = tl.maximum(recursion, 0) if TAKEN == 1 else recursion * 0 + each
        known = lengths_SQ, tables_SQX, nobodys, cos_LE, sin_LE
        to = cos_ANE, sin_ANE, page_AN, entry_AN, table_AN, last_AN, recursion_AN, overlay_RXP, overlay_stride
        rows = each * num_slots + slot, slot, number, own, runs
        place_block(*rows, *known, *to, OVERLAYING, READS_FIRST, WRITES_OWN, SEQUENCES, WIDTH, ENTRIES, SIZE, BLOCK_E)


@kernel
def settle_kernel(
    merged_ND,
    x_ND,
    taken_N,
    gate_N,
    ints_IS,
    floats_SF,
    stream_SD,
    x_SD,
    visit_1,
    merged_stride,
    x_stride,
    column,
    TAKEN: tl.constexpr,
    NUM_FLOATS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One slot."""
    slot = tl.program_id(0).to(tl.int64)
    ints = ints_IS + slot
    recursion, active = tl.load(ints + _RECURSION * column), tl.load(ints + _ACTIVE * column)
    runs = (recursion >= 0) & (tl.load(ints + _LIVE * column) > 0)
    goes_on = runs & (tl.load(taken_N + slot).to(tl.int64) > 0)
    depth = tl.load(ints + _DEPTH * column)
    tl.debug_barrier()
    tl.store(ints + _DEPTH * column, depth + TAKEN * active * runs)
    tl.store(ints + _RECURSION * column, tl.where(goes_on, recursion + TAKEN, _RESTING))
    tl.store(ints + _ACTIVE * column, goes_on.to(tl.int64))
    tl.store(floats_SF + slot * NUM_FLOATS + _GATE, tl.load(gate_N + slot).to(tl.float64))
    if runs:
        copy_row(merged_ND + slot * merged_stride, stream_SD + slot * HIDDEN, HIDDEN, BLOCK_D)
        copy_row(x_ND + slot * x_stride, x_SD + slot * HIDDEN, HIDDEN, BLOCK_D)
    if slot == 0:
        tl.store(visit_1, tl.load(visit_1) + 1)
