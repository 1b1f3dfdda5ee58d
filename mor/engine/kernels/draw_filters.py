"""Top-k and top-p of one row of logits inside a kernel, and the draw from what they leave.

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
def _key(x, SHIFT: tl.constexpr):
    """Integers in the order of the floats, of their leading 32 - SHIFT bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@kernel
def _value(key, SHIFT: tl.constexpr):
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
        key_B = _key(x_B, SHIFT)
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
        key_B = _key(x_B, SHIFT)
        is_in_B = is_in_B & (key_B >= low) & (key_B < high)
        found = tl.sum(is_in_B.to(tl.int32), 0)
        if found > 0:
            weight_B = weight(scale(x_B, largest, temperature))
            mass += tl.sum(tl.where(is_in_B, weight_B, 0), 0)
        count += found
    return count, mass


@kernel
def _middle(low, high):
    return ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)


@kernel
def _kth_key(logits_V, k, top, SIZE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_B: tl.constexpr):
    """The key of the k-th largest logit, and how many tokens have larger ones. `top`: the largest key."""
    low, high, above = _key(tl.full([], float("-inf"), tl.float32), SHIFT), top + 1, tl.full([], 0, tl.int32)
    while high > low + 1:
        middle = _middle(low, high)
        count = _count_between(logits_V, middle, high, SIZE, SHIFT, BLOCK_B)
        if above + count >= k:
            low = middle
        else:
            high = middle
            above += count
    return low, above


@kernel
def _nucleus(
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
    each = weight(scale(_value(kth, SHIFT), largest, temperature))
    wanted = top_p * (mass + (k - above_kth).to(tl.int64) * each).to(tl.float64)
    low, high, above, mass = kth, top + 1, tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    while high > low + 1:
        middle = _middle(low, high)
        count, more = _weigh_between(logits_V, middle, high, largest, temperature, SIZE, SHIFT, BLOCK_B)
        if (mass + more).to(tl.float64) >= wanted:
            low = middle
        else:
            high = middle
            above += count
            mass += more
    each = weight(scale(_value(low, SHIFT), largest, temperature))
    few, many = (
        tl.full([], 0, tl.int32),
        tl.minimum(_count_between(logits_V, low, low + 1, SIZE, SHIFT, BLOCK_B), k - above),
    )
    while many > few + 1:  # of the equal ones, as many as it takes
        middle = _middle(few, many)
        if (mass + middle.to(tl.int64) * each).to(tl.float64) >= wanted:
            many = middle
        else:
            few = middle
    return low, above + many


@kernel
def limit(
    logits_V,
    top_k,
    top_p,
    largest,
    temperature,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The least scaled logit that top-k and top-p keep, and how many tokens of just that."""
    top = _key(largest, SHIFT)
    least, above = _key(tl.full([], float("-inf"), tl.float32), SHIFT), tl.full([], 0, tl.int32)
    count = tl.full([], SIZE, tl.int32)
    if (top_k > 0) & (top_k < SIZE):
        count = top_k.to(tl.int32)
        least, above = _kth_key(logits_V, count, top, SIZE, SHIFT, BLOCK_B)
    if top_p < 1:
        least, count = _nucleus(logits_V, count, least, above, top, top_p, largest, temperature, SIZE, SHIFT, BLOCK_B)
    scaled = scale(_value(least, SHIFT), largest, temperature)
    for first in range(0, SIZE, BLOCK_B):  # different logits may be equal when scaled, as 0 and -0 are
        _, _, x_B = read(logits_V, first, SIZE, BLOCK_B)
        count -= tl.sum((scale(x_B, largest, temperature) > scaled).to(tl.int32), 0)
    return scaled, count


@kernel
def _kept(logits_V, first, largest, temperature, least, room, lightest, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Weights of a block after all filters, and how many more tokens of just `least` may be kept behind it."""
    _, is_in_B, x_B = read(logits_V, first, SIZE, BLOCK_B)
    scaled_B = scale(x_B, largest, temperature)
    weight_B = weight(scaled_B)
    is_equal_B = (scaled_B == least) & is_in_B
    num_equal = tl.sum(is_equal_B.to(tl.int32), 0)
    is_kept_B = scaled_B > least
    if num_equal > 0:
        is_kept_B = is_kept_B | (is_equal_B & (tl.cumsum(is_equal_B.to(tl.int32), 0) <= room))
    weight_B = tl.where(is_kept_B & (weight_B >= lightest), weight_B, 0)
    return weight_B, room - num_equal


@kernel
def draw_limited(
    logits_V,
    largest,
    temperature,
    top_k,
    top_p,
    lightest,
    uniform,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The first token at which the running sum of the weights that the filters leave is more than `uniform` of their
    total."""
    least, room = limit(logits_V, top_k, top_p, largest, temperature, SIZE, SHIFT, BLOCK_B)
    total, left = tl.full([], 0, tl.int64), room
    for first in range(0, SIZE, BLOCK_B):
        weight_B, left = _kept(logits_V, first, largest, temperature, least, left, lightest, SIZE, BLOCK_B)
        total += tl.sum(weight_B, 0)
    target = (uniform * total.to(tl.float64)).to(tl.int64)
    token, first, left = tl.full([], -1, tl.int32), tl.full([], 0, tl.int32), room
    while (token < 0) & (first < SIZE):
        weight_B, left = _kept(logits_V, first, largest, temperature, least, left, lightest, SIZE, BLOCK_B)
        mass = tl.sum(weight_B, 0)
        if mass > target:
            token = first + tl.sum((tl.cumsum(weight_B, 0) <= target).to(tl.int32), 0)
        target -= mass
        first += BLOCK_B
    return token
