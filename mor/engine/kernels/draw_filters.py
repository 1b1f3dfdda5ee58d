"""Weights of tokens, and top-k and top-p of a row of logits by one program.

What is kept is found by halving an interval of the logits' ordered bits: counts of tokens and sums of their integer
weights decide, so the result is exact and the order of summation does not matter.

Legend: V vocabulary, B tokens of a block.
"""

from __future__ import annotations

import triton.language as tl

from mor.engine.kernels.launch import kernel


@kernel
def read(logits_V, first, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Tokens from `first` on, which of them there are, and their logits."""
    token_B = first + tl.arange(0, BLOCK_B)
    x_B = tl.load(logits_V + token_B, mask=token_B < SIZE, other=float("-inf")).to(tl.float32)
    return token_B, token_B < SIZE, x_B


@kernel
def in_order(x, SHIFT: tl.constexpr):
    """Integers in the order of the floats, of their leading 32 - SHIFT bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@kernel
def of_order(key, SHIFT: tl.constexpr):
    """The float of a key, whose trailing bits are 0."""
    flipped = key ^ (tl.full([], 0x7FFFFFFF, tl.int32) >> SHIFT)
    bits = tl.where(key < 0, flipped, key) << SHIFT
    return bits.to(tl.float32, bitcast=True)


@kernel
def scale(x, largest, temperature):
    scaled = x.to(tl.float64) - largest.to(tl.float64)
    if temperature != 1:  # a division in double precision costs half as much as the exponential
        scaled = scaled / temperature
    return scaled


@kernel
def weight(scaled):
    """Integers from 0 to 2**40, rounded half to even: beside 2**52 a double holds no fraction, and its low bits are the
    integer."""
    return (tl.exp(scaled) * 1099511627776.0 + 4503599627370496.0).to(tl.int64, bitcast=True) - 0x4330000000000000


@kernel
def _count_between(logits_V, low, high, SIZE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_B: tl.constexpr):
    """How many tokens have keys in [low, high)."""
    count_B = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, SIZE, BLOCK_B):
        _, is_in_B, x_B = read(logits_V, first, SIZE, BLOCK_B)
        key_B = in_order(x_B, SHIFT)
        count_B += (is_in_B & (key_B >= low) & (key_B < high)).to(tl.int32)
    return tl.sum(count_B, 0)


@kernel
def _weigh_between(
    logits_V,
    low,
    high,
    largest,
    temperature,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """How many tokens have keys in [low, high), and what they weigh."""
    count, mass = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    for first in range(0, SIZE, BLOCK_B):
        _, is_in_B, x_B = read(logits_V, first, SIZE, BLOCK_B)
        key_B = in_order(x_B, SHIFT)
        is_in_B = is_in_B & (key_B >= low) & (key_B < high)
        found = tl.sum(is_in_B.to(tl.int32), 0)
        if found > 0:
            weight_B = weight(scale(x_B, largest, temperature))
            mass += tl.sum(tl.where(is_in_B, weight_B, 0), 0)
        count += found
    return count, mass


@kernel
def middle_of(low, high):
    return ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)


@kernel
def kth_key(logits_V, k, top, SIZE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_B: tl.constexpr):
    """The key of the k-th largest logit, and how many tokens have larger ones. `top`: the largest key."""
    low, high, above = in_order(tl.full([], float("-inf"), tl.float32), SHIFT), top + 1, tl.full([], 0, tl.int32)
    while high > low + 1:
        middle = middle_of(low, high)
        count = _count_between(logits_V, middle, high, SIZE, SHIFT, BLOCK_B)
        if above + count >= k:
            low = middle
        else:
            high = middle
            above += count
    return low, above


@kernel
def fewest_of_equals(most, mass, each, wanted):
    """How many of at most so many tokens, `each` of the same weight, bring `mass` to what is wanted."""
    few, many = tl.full([], 0, tl.int32), most
    while many > few + 1:
        middle = middle_of(few, many)
        if (mass + middle.to(tl.int64) * each).to(tl.float64) >= wanted:
            many = middle
        else:
            few = middle
    return many


@kernel
def nucleus(
    logits_V,
    k,
    kth,
    above_kth,
    top,
    top_p,
    largest,
    temperature,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The least key that top-p keeps of the k largest, and how many tokens it keeps."""
    _, mass = _weigh_between(logits_V, kth + 1, top + 1, largest, temperature, SIZE, SHIFT, BLOCK_B)
    each = weight(scale(of_order(kth, SHIFT), largest, temperature))
    wanted = top_p * (mass + (k - above_kth).to(tl.int64) * each).to(tl.float64)
    low, high, above, mass = kth, top + 1, tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    while high > low + 1:
        middle = middle_of(low, high)
        count, more = _weigh_between(logits_V, middle, high, largest, temperature, SIZE, SHIFT, BLOCK_B)
        if (mass + more).to(tl.float64) >= wanted:
            low = middle
        else:
            high = middle
            above += count
            mass += more
    each = weight(scale(of_order(low, SHIFT), largest, temperature))
    most = tl.minimum(_count_between(logits_V, low, low + 1, SIZE, SHIFT, BLOCK_B), k - above)
    return low, above + fewest_of_equals(most, mass, each, wanted)
