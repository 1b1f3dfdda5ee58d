"""Where top-k and top-p cut rows of logits, found by as many programs a row as there are blocks of its vocabulary.

Two surveys in float32 narrow the cut down to a short interval of logits. A third pass sums exactly what lies above the
interval and gathers what lies in it, and one program a row then finds the cut among that. If the exact sums say that
it is elsewhere, or more was gathered than there is room for, the program searches the whole row. So the surveys decide
how long it takes, and never the result. Rows without top-k and top-p are left at once.

Legend: N rows, V vocabulary, S blocks of a row, B tokens of a block, T depths surveyed at once, C tokens gathered.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mor.engine.kernels.draw_filters import (
    fewest_of_equals,
    in_order,
    kth_key,
    middle_of,
    nucleus,
    of_order,
    read,
    scale,
    weight,
)
from mor.engine.kernels.launch import kernel

DEPTHS = 16
"""Depths that a survey looks at."""

ROOM = 4096
"""Tokens of a row that can be gathered."""


@kernel
def start_early(EARLY: tl.constexpr):
    """Lets the kernel behind start, and waits for the one ahead."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@kernel
def row_of_blocks(peak_NS, row, num_blocks, PAD_S: tl.constexpr):
    """Where a row's blocks stand, which there are, their peaks, the largest, and whether a token can be chosen."""
    block_S = tl.arange(0, PAD_S)
    place_S, is_in_S = row * num_blocks + block_S, block_S < num_blocks
    peak_S = tl.load(peak_NS + place_S, mask=is_in_S, other=float("-inf"))
    largest = tl.max(peak_S, 0)
    return place_S, is_in_S, peak_S, largest, tl.abs(largest) < float("inf")


@kernel
def largest_of(peak_NS, row, num_blocks, PAD_S: tl.constexpr):
    """A row's largest logit, and whether a token can be chosen."""
    _, _, _, largest, is_sound = row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    return largest, is_sound


@kernel
def _limits(temperature_NF, top_k_NF, top_p_NF, row, t_stride, k_stride, p_stride, SIZE: tl.constexpr):
    """A row's temperature, its k (0 without top-k), its p, and whether they limit what is drawn."""
    temperature = tl.load(temperature_NF + row * t_stride).to(tl.float64)
    k = tl.load(top_k_NF + row * k_stride)
    k = tl.where((k > 0) & (k < SIZE), k, 0).to(tl.int32)
    p = tl.load(top_p_NF + row * p_stride).to(tl.float64)
    return temperature, k, p, (temperature > 0) & ((k > 0) | (p < 1))


@kernel
def _depth(t, near, far, ROUND: tl.constexpr, T: tl.constexpr):
    """The t-th depth below the largest logit, in units of the temperature: first in growing steps, at last without
    end, then in equal steps between two."""
    if ROUND == 0:
        depth = tl.where(t < 0, 0.0, tl.where(t >= T - 1, float("inf"), 0.35 * tl.exp2(0.4854 * t)))
    else:
        depth = near + (far - near) * ((t + 1.0) / T)
    return depth


@kernel
def _reached(count_NST, mass_NST, row, num_blocks, k, wanted, PAD_S: tl.constexpr, T: tl.constexpr):
    """The first of the depths surveyed above which there are k tokens, or as much mass as is wanted."""
    block_S1, t_1T = tl.arange(0, PAD_S)[:, None], tl.arange(0, T)[None, :]
    place_ST = (row * num_blocks + block_S1) * T + t_1T
    count_T = tl.sum(tl.load(count_NST + place_ST, mask=block_S1 < num_blocks, other=0), 0)
    mass_T = tl.sum(tl.load(mass_NST + place_ST, mask=block_S1 < num_blocks, other=0.0), 0)
    wanted = tl.where(wanted < 0, -wanted * tl.max(mass_T, 0), wanted)
    is_short_T = tl.where(k > 0, count_T < k, mass_T < wanted)
    return tl.minimum(tl.sum(is_short_T.to(tl.int32), 0), T - 1), wanted


@kernel
def _interval(
    count_RNST, mass_RNST, row, num_rows, num_blocks, k, p, ROUNDS: tl.constexpr, PAD_S: tl.constexpr, T: tl.constexpr
):
    """Between which depths the cut lies, as far as `ROUNDS` surveys tell; the nearer one is -1 for none."""
    near, far = tl.full([], -1.0, tl.float32), tl.full([], float("inf"), tl.float32)
    wanted = -p.to(tl.float32)
    for r in tl.static_range(ROUNDS):  # pyright: ignore
        first = r * num_rows.to(tl.int64) * num_blocks * T
        t, wanted = _reached(count_RNST + first, mass_RNST + first, row, num_blocks, k, wanted, PAD_S, T)
        before = tl.maximum(near, 0.0)
        nearer = tl.where(t > 0, _depth((t - 1).to(tl.float32), before, far, r, T), near)
        far = tl.where(t < T - 1, _depth(t.to(tl.float32), before, far, r, T), far)
        near = nearer
    return near, far


@kernel(do_not_specialize=["t_stride", "k_stride", "p_stride", "num_rows", "num_blocks"])
def survey_depths(
    logits_NV,
    temperature_NF,
    top_k_NF,
    top_p_NF,
    peak_NS,
    count_RNST,
    mass_RNST,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    num_rows,
    num_blocks,
    ROUND: tl.constexpr,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
    T: tl.constexpr,
):
    """How many of a block's tokens lie above each of the depths, and about what they weigh."""
    start_early(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, is_limited = _limits(temperature_NF, top_k_NF, top_p_NF, row, t_stride, k_stride, p_stride, SIZE)
    if is_limited:
        largest, is_sound = largest_of(peak_NS, row, num_blocks, PAD_S)
        if is_sound:
            near, far = _interval(count_RNST, mass_RNST, row, num_rows, num_blocks, k, p, ROUND, PAD_S, T)
            near, unit = tl.maximum(near, 0.0), temperature.to(tl.float32)
            _, is_in_B, x_B = read(logits_NV + row * row_stride, block * BLOCK_B, SIZE, BLOCK_B)
            weight_B = tl.exp2((x_B - largest) / unit * 1.4426950408889634)
            place = ((ROUND * num_rows + row) * num_blocks + block) * T
            for t in tl.static_range(T):  # pyright: ignore
                is_above_B = is_in_B & (x_B >= largest - unit * _depth(tl.full([], t, tl.float32), near, far, ROUND, T))
                tl.store(count_RNST + place + t, tl.sum(is_above_B.to(tl.int32), 0))
                tl.store(mass_RNST + place + t, tl.sum(tl.where(is_above_B, weight_B, 0.0), 0))


@kernel(do_not_specialize=["t_stride", "k_stride", "p_stride", "num_rows", "num_blocks"])
def gather_near_cut(
    logits_NV,
    temperature_NF,
    top_k_NF,
    top_p_NF,
    peak_NS,
    count_RNST,
    mass_RNST,
    above_NS,
    sums_2NS,
    found_N,
    near_NC,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    num_rows,
    num_blocks,
    ROUNDS: tl.constexpr,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    """How many of a block's tokens lie above the interval, what they and all weigh; those in it are gathered, in any
    order of the blocks. With top-k and top-p the interval has no upper end, so that it holds all that top-k keeps."""
    start_early(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, is_limited = _limits(temperature_NF, top_k_NF, top_p_NF, row, t_stride, k_stride, p_stride, SIZE)
    if is_limited:
        largest, is_sound = largest_of(peak_NS, row, num_blocks, PAD_S)
        if is_sound:
            near, far = _interval(count_RNST, mass_RNST, row, num_rows, num_blocks, k, p, ROUNDS, PAD_S, T)
            unit = temperature.to(tl.float32)
            is_open = (near < 0) | ((k > 0) & (p < 1))
            high, low = tl.where(is_open, float("inf"), largest - unit * near), largest - unit * far
            _, is_in_B, x_B = read(logits_NV + row * row_stride, block * BLOCK_B, SIZE, BLOCK_B)
            weight_B = weight(scale(x_B, largest, temperature))  # of tokens that are none 0
            is_above_B, place = is_in_B & (x_B >= high), row * num_blocks + block
            tl.store(above_NS + place, tl.sum(is_above_B.to(tl.int32), 0))
            tl.store(sums_2NS + place, tl.sum(tl.where(is_above_B, weight_B, 0), 0))
            tl.store(sums_2NS + num_rows.to(tl.int64) * num_blocks + place, tl.sum(weight_B, 0))
            is_near_B = is_in_B & (x_B >= low) & (x_B < high)
            rank_B = tl.cumsum(is_near_B.to(tl.int32), 0)
            count = tl.sum(is_near_B.to(tl.int32), 0)
            if count > 0:
                place_B = tl.atomic_add(found_N + row, count) + rank_B - 1
                tl.store(near_NC + row * C + place_B, x_B, mask=is_near_B & (place_B < C))


@kernel
def _kth_near(key_C, is_in_C, above, k, bottom, top):
    """`kth_key` among what was gathered, `above` which there are more."""
    low, high = bottom, top + 1
    while high > low + 1:
        middle = middle_of(low, high)
        count = tl.sum((is_in_C & (key_C >= middle) & (key_C < high)).to(tl.int32), 0)
        if above + count >= k:
            low = middle
        else:
            high = middle
            above += count
    return low, above


@kernel
def _nucleus_near(
    key_C, is_in_C, weight_C, above, mass, k, wanted, bottom, top, largest, temperature, SHIFT: tl.constexpr
):
    """`nucleus` among what was gathered, above which there are `above` tokens of `mass`."""
    low, high = bottom, top + 1
    while high > low + 1:
        middle = middle_of(low, high)
        is_more_C = is_in_C & (key_C >= middle) & (key_C < high)
        more = tl.sum(tl.where(is_more_C, weight_C, 0), 0)
        if (mass + more).to(tl.float64) >= wanted:
            low = middle
        else:
            high = middle
            above += tl.sum(is_more_C.to(tl.int32), 0)
            mass += more
    each = weight(scale(of_order(low, SHIFT), largest, temperature))
    most = tl.minimum(tl.sum((is_in_C & (key_C == low)).to(tl.int32), 0), k - above)
    return low, above + fewest_of_equals(most, mass, each, wanted)


@kernel(do_not_specialize=["t_stride", "k_stride", "p_stride", "num_rows", "num_blocks"])
def find_cut(
    logits_NV,
    temperature_NF,
    top_k_NF,
    top_p_NF,
    peak_NS,
    above_NS,
    sums_2NS,
    found_N,
    near_NC,
    least_N,
    kept_N,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    num_rows,
    num_blocks,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
    C: tl.constexpr,
):
    """The least scaled logit that top-k and top-p keep, -infinity if all, and how many tokens they keep."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    temperature, k, p, is_limited = _limits(temperature_NF, top_k_NF, top_p_NF, row, t_stride, k_stride, p_stride, SIZE)
    place_S, is_in_S, _, largest, is_sound = row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    least, kept = tl.full([], float("-inf"), tl.float64), tl.full([], SIZE, tl.int32)
    if is_limited & is_sound:
        above = tl.sum(tl.load(above_NS + place_S, mask=is_in_S, other=0), 0)
        mass = tl.sum(tl.load(sums_2NS + place_S, mask=is_in_S, other=0), 0)
        total_NS = sums_2NS + num_rows.to(tl.int64) * num_blocks
        wanted = p * tl.sum(tl.load(total_NS + place_S, mask=is_in_S, other=0), 0).to(tl.float64)
        found = tl.load(found_N + row)
        is_in_C = tl.arange(0, C) < found
        x_C = tl.where(
            is_in_C, tl.load(near_NC + row * C + tl.arange(0, C)), float("-inf")
        )  # all of it, 16 bytes a read
        key_C = in_order(x_C, SHIFT)
        top = tl.max(tl.where(is_in_C, key_C, -0x7FFFFFFF), 0)
        bottom = tl.min(tl.where(is_in_C, key_C, 0x7FFFFFFE), 0)
        weight_C = tl.where(is_in_C, weight(scale(x_C, largest, temperature)), 0)
        if k > 0:
            is_there = (above < k) & (above + found >= k)
        else:
            is_there = (mass.to(tl.float64) < wanted) & ((mass + tl.sum(weight_C, 0)).to(tl.float64) >= wanted)
        logits_V, first = logits_NV + row * row_stride, in_order(largest, SHIFT)
        key, count = in_order(tl.full([], float("-inf"), tl.float32), SHIFT), tl.full([], 0, tl.int32)
        if is_there & (found <= C):
            key, kept = bottom, tl.where(k > 0, k, SIZE)
            if k > 0:
                key, count = _kth_near(key_C, is_in_C, above, k, bottom, top)
                each = weight(scale(of_order(key, SHIFT), largest, temperature))
                larger = mass + tl.sum(tl.where(is_in_C & (key_C > key), weight_C, 0), 0)
                wanted = p * (larger + (k - count).to(tl.int64) * each).to(tl.float64)
            if p < 1:
                near = key_C, is_in_C, weight_C, above, mass
                key, kept = _nucleus_near(*near, kept, wanted, key, top, largest, temperature, SHIFT)
        else:
            kept = tl.where(k > 0, k, SIZE)
            if k > 0:
                key, count = kth_key(logits_V, k, first, SIZE, SHIFT, BLOCK_B)
            if p < 1:
                key, kept = nucleus(logits_V, kept, key, count, first, p, largest, temperature, SIZE, SHIFT, BLOCK_B)
        least = scale(of_order(key, SHIFT), largest, temperature)
    tl.store(least_N + row, least)
    tl.store(kept_N + row, kept)
