"""The next tokens of many rows on the device: `mor.engine.sampler` without its penalties, bans and lists.

Each row's vocabulary is cut into blocks, and each block has a program of its own: one kernel finds the blocks' largest
logits, one sums the weights that these decide, and one finds the block in which the draw ends, and the token in it. As
in the sampler, what decides is exact: sums of integer weights. Where top-k and top-p cut a row is found between the
first two (`draw_limits`).

Legend: N rows, V vocabulary, S blocks of a row, B tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.engine import plain_ops
from mor.engine.kernels.draw_filters import read, scale, weight
from mor.engine.kernels.draw_limits import (
    DEPTHS,
    ROOM,
    find_cut,
    gather_near_cut,
    row_of_blocks,
    start_early,
    survey_depths,
)
from mor.engine.kernels.launch import kernel, runs_kernel, starts_early

BLOCK = 2048
"""Tokens of a block. A program of 4 warps has 16 of them a thread, and a row of 49,152 has 24 programs."""

NUM_WARPS = 4
_CUT_WARPS = 16  # of the one program that finds a row's cut


@kernel
def _mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@kernel
def _uniform(seed, index):
    """`mor.engine.sampler.uniform`: a double in [0, 1)."""
    step = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    mixed = _mix(_mix(seed.to(tl.uint64) * step + step) + (index.to(tl.uint64) + 1) * step)
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@kernel(do_not_specialize=["num_blocks"])
def _survey_blocks(
    logits_NV,
    peak_NS,
    total_NS,
    found_N,
    row_stride,
    num_blocks,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A block's largest logit, infinity if it holds NaN, and the sum of the exponentials relative to it."""
    start_early(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, x_B = read(logits_NV + row * row_stride, block * BLOCK_B, SIZE, BLOCK_B)
    x_B = tl.where(x_B == x_B, x_B, float("inf"))
    peak = tl.max(x_B, 0)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # no infinity less itself
    place = row * num_blocks + block
    if found_N is not None:
        tl.store(found_N + row, 0, mask=block == 0)
    tl.store(peak_NS + place, peak)
    tl.store(total_NS + place, tl.sum(tl.exp(tl.minimum(x_B - base, 0.0)), 0))


@kernel
def _lightest(min_p):
    """The least weight that min-p keeps: as weights are integers, its share of 2**40 rounded up."""
    return tl.ceil(min_p.to(tl.float64) * 1099511627776.0).to(tl.int64)


@kernel
def _least(least_N, row):
    """The scaled logit of a row's cut: all lie above it where no row has one."""
    least = tl.full([], float("-inf"), tl.float64)
    if least_N is not None:
        least = tl.load(least_N + row)
    return least


@kernel
def _weights(logits_V, first, largest, temperature, least, lightest, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Weights of a block's tokens above the cut; which others lie above or just at it."""
    _, is_in_B, x_B = read(logits_V, first, SIZE, BLOCK_B)
    scaled_B = scale(x_B, largest, temperature)
    weight_B = weight(scaled_B)
    is_above_B = scaled_B > least
    weight_B = tl.where(is_above_B & (weight_B >= lightest), weight_B, 0)
    return weight_B, is_above_B, is_in_B & (scaled_B == least)


@kernel(do_not_specialize=["t_stride", "m_stride", "num_rows", "num_blocks"])
def _weigh_blocks(
    logits_NV,
    temperature_N,
    min_p_N,
    peak_NS,
    least_N,
    mass_NS,
    counts_2NS,
    row_stride,
    t_stride,
    m_stride,
    num_rows,
    num_blocks,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """What a block's tokens above the cut weigh, and how many there are above it and just at it."""
    start_early(EARLY)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_N + row * t_stride).to(tl.float64)
    _, _, _, largest, is_sound = row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    if (temperature > 0) & is_sound:
        lightest, least = _lightest(tl.load(min_p_N + row * m_stride)), _least(least_N, row)
        weight_B, is_above_B, is_equal_B = _weights(
            logits_NV + row * row_stride, block * BLOCK_B, largest, temperature, least, lightest, SIZE, BLOCK_B
        )
        place = row * num_blocks + block
        tl.store(mass_NS + place, tl.sum(weight_B, 0))
        if (least_N is not None) and (least > float("-inf")):
            tl.store(counts_2NS + place, tl.sum(is_above_B.to(tl.int32), 0))
            equal_NS = counts_2NS + num_rows.to(tl.int64) * num_blocks
            tl.store(equal_NS + place, tl.sum(is_equal_B.to(tl.int32), 0))


@kernel
def _found(
    logits_V,
    mass_S,
    equal_S,
    room,
    largest,
    temperature,
    least,
    lightest,
    uniform,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """The first token at which the running sum of the weights is more than `uniform` of their total. Of the tokens just
    at the cut the first `room` are kept."""
    each = weight(least)
    each = tl.where(each >= lightest, each, 0)
    kept_S = tl.minimum(tl.maximum(room - (tl.cumsum(equal_S, 0) - equal_S), 0), equal_S)
    mass_S += kept_S.to(tl.int64) * each
    target = (uniform * tl.sum(mass_S, 0).to(tl.float64)).to(tl.int64)
    block_S = tl.arange(0, PAD_S)
    block = tl.sum((tl.cumsum(mass_S, 0) <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(block_S < block, mass_S, 0), 0)
    kept = tl.sum(tl.where(block_S == block, kept_S, 0), 0)
    weight_B, _, is_equal_B = _weights(logits_V, block * BLOCK_B, largest, temperature, least, lightest, SIZE, BLOCK_B)
    if kept > 0:
        is_kept_B = is_equal_B & (tl.cumsum(is_equal_B.to(tl.int32), 0) <= kept)
        weight_B = tl.where(is_kept_B, each, weight_B)
    return block * BLOCK_B + tl.sum((tl.cumsum(weight_B, 0) <= target).to(tl.int32), 0)


@kernel
def _first(logits_V, peak_S, largest, SIZE: tl.constexpr, BLOCK_B: tl.constexpr, PAD_S: tl.constexpr):
    """The first token that has the largest logit."""
    block = tl.min(tl.where(peak_S == largest, tl.arange(0, PAD_S), PAD_S), 0)
    token_B, _, x_B = read(logits_V, block * BLOCK_B, SIZE, BLOCK_B)
    return tl.min(tl.where(x_B == largest, token_B, SIZE), 0)


@kernel
def _logprob(logits_V, token, place_S, is_in_S, peak_S, total_NS, largest):
    """Log-softmax at a token, in float32."""
    total_S = tl.load(total_NS + place_S, mask=is_in_S, other=0.0) * tl.exp(peak_S - largest)
    return tl.load(logits_V + token).to(tl.float32) - largest - tl.log(tl.sum(total_S, 0))


@kernel(do_not_specialize=["t_stride", "m_stride", "s_stride", "i_stride", "num_rows", "num_blocks"])
def _choose_tokens(
    logits_NV,
    temperature_N,
    min_p_N,
    seed_N,
    index_N,
    peak_NS,
    total_NS,
    least_N,
    kept_N,
    mass_NS,
    counts_2NS,
    token_N,
    logprob_N,
    row_stride,
    t_stride,
    m_stride,
    s_stride,
    i_stride,
    num_rows,
    num_blocks,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """A row's token and its log-probability."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * row_stride
    temperature = tl.load(temperature_N + row * t_stride).to(tl.float64)
    place_S, is_in_S, peak_S, largest, is_sound = row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    token, logprob = tl.full([], -1, tl.int32), tl.full([], float("nan"), tl.float32)
    if is_sound:
        if temperature > 0:
            uniform = _uniform(tl.load(seed_N + row * s_stride), tl.load(index_N + row * i_stride))
            lightest, least = _lightest(tl.load(min_p_N + row * m_stride)), _least(least_N, row)
            equal_S, room = tl.zeros([PAD_S], tl.int32), 0
            if least_N is not None:
                is_cut_S = tl.arange(0, PAD_S) < tl.where(least > float("-inf"), num_blocks, 0)
                equal_NS = counts_2NS + num_rows.to(tl.int64) * num_blocks
                equal_S = tl.load(equal_NS + place_S, mask=is_cut_S, other=0)
                room = tl.load(kept_N + row) - tl.sum(tl.load(counts_2NS + place_S, mask=is_cut_S, other=0), 0)
            mass_S = tl.load(mass_NS + place_S, mask=is_in_S, other=0)
            drawn = largest, temperature, least, lightest, uniform
            token = _found(logits_V, mass_S, equal_S, room, *drawn, SIZE, BLOCK_B, PAD_S)
        else:
            token = _first(logits_V, peak_S, largest, SIZE, BLOCK_B, PAD_S)
        logprob = _logprob(logits_V, token, place_S, is_in_S, peak_S, total_NS, largest)
    tl.store(token_N + row, token.to(tl.int64))
    tl.store(logprob_N + row, logprob)


def draw_tokens(
    logits_NV: Tensor,
    temperature_N: Tensor,
    top_k_N: Tensor,
    top_p_N: Tensor,
    min_p_N: Tensor,
    seed_N: Tensor,
    index_N: Tensor,
    *,
    limited: bool = True,
    block: int = BLOCK,
    room: int = ROOM,
) -> tuple[Tensor, Tensor]:
    """The next token (N,) int64 of each row and its log-probability (N,) float32, as `mor.engine.sampler.sample` has
    them for `SamplingParams` of these numbers. `limited` False: no row has top-k or top-p, which are not looked at.

    Log-probabilities are of the logits as they came. Token -1 and NaN where the logits hold NaN or infinity or leave no
    token to choose. The six tensors may have any stride, and integers and floats of any width. `block` and `room`,
    powers of two, are for tuning. Raises ValueError for what the kernel cannot read.
    """
    rows = (temperature_N, top_k_N, top_p_N, min_p_N, seed_N, index_N)
    if not runs_kernel(logits_NV):
        return plain_ops.draw_tokens(logits_NV, *rows, limited=limited)
    if logits_NV.stride(1) != 1 or logits_NV.dtype == torch.float64:
        raise ValueError(f"logits of {logits_NV.dtype} and strides {logits_NV.stride()} are not rows of single floats")
    if any(len(each) != len(logits_NV) or each.device != logits_NV.device for each in rows):
        raise ValueError(f"each of {[tuple(each.shape) for each in rows]} must have {len(logits_NV)} rows")
    if block < 16 or block & (block - 1):
        raise ValueError(f"block={block} must be a power of two, at least 16")
    token_N = torch.empty(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    logprob_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    if len(logits_NV):
        _launch(logits_NV, rows, token_N, logprob_N, block, room if limited else 0)
    return token_N, logprob_N


def _launch(
    logits_NV: Tensor, rows: tuple[Tensor, ...], token_N: Tensor, logprob_N: Tensor, block: int, room: int
) -> None:
    """`room` 0: no row is cut."""
    (num_rows, size), early = logits_NV.shape, starts_early(logits_NV)
    block = min(block, max(16, 1 << (size - 1).bit_length()))
    num_blocks = -(-size // block)
    grid = num_rows, num_blocks

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_NV.device)

    temperature, _, _, min_p, seed, index = ((each, each.stride(0)) for each in rows)
    peak_NS, total_NS = empty(torch.float32, 2, *grid)
    mass_NS, stride = empty(torch.int64, *grid), logits_NV.stride(0)
    found_N = empty(torch.int32, num_rows) if room else None
    least_N, kept_N, counts_2NS = None, None, None
    alike: dict[str, Any] = dict(EARLY=early, SIZE=size, BLOCK_B=block, num_warps=NUM_WARPS, launch_pdl=early)
    shape: dict[str, Any] = alike | dict(PAD_S=triton.next_power_of_2(num_blocks))
    _survey_blocks[grid](logits_NV, peak_NS, total_NS, found_N, stride, num_blocks, **alike)
    if found_N is not None:
        least_N, kept_N, counts_2NS = _cut(logits_NV, rows[:3], peak_NS, found_N, room, shape)
    _weigh_blocks[grid](
        *(logits_NV, temperature[0], min_p[0], peak_NS, least_N, mass_NS, counts_2NS),
        *(stride, temperature[1], min_p[1], *grid),
        **shape,
    )
    _choose_tokens[(num_rows,)](
        *(logits_NV, temperature[0], min_p[0], seed[0], index[0]),
        *(peak_NS, total_NS, least_N, kept_N, mass_NS, counts_2NS, token_N, logprob_N),
        *(stride, temperature[1], min_p[1], seed[1], index[1], *grid),
        **shape,
    )


def _cut(
    logits_NV: Tensor, limits: tuple[Tensor, ...], peak_NS: Tensor, found_N: Tensor, room: int, shape: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row is cut, the scaled logit (N,) and how many are kept (N,); and room for counts (2, N, S) of what
    lies above and at it."""
    grid, num_rows = peak_NS.shape, len(peak_NS)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_NV.device)

    strides = logits_NV.stride(0), *(each.stride(0) for each in limits)
    known = logits_NV, *limits, peak_NS
    count_RNST, mass_RNST = empty(torch.int32, 2, *grid, DEPTHS), empty(torch.float32, 2, *grid, DEPTHS)
    for number in range(2):
        survey_depths[grid](*(*known, count_RNST, mass_RNST, *strides, *grid), **shape, ROUND=number, T=DEPTHS)
    counts_2NS, kept_N = empty(torch.int32, 2, *grid), empty(torch.int32, num_rows)
    least_N = empty(torch.float64, num_rows)
    gathered = counts_2NS[0], empty(torch.int64, 2, *grid), found_N, empty(torch.float32, num_rows, room)
    gather_near_cut[grid](
        *(*known, count_RNST, mass_RNST, *gathered, *strides, *grid), **shape, ROUNDS=2, T=DEPTHS, C=room
    )
    find_cut[(num_rows,)](
        *(*known, *gathered, least_N, kept_N, *strides, *grid),
        **shape | dict(num_warps=_CUT_WARPS),
        SHIFT=16 if logits_NV.dtype == torch.bfloat16 else 0,
        C=room,
    )
    return least_N, kept_N, counts_2NS
