"""The next tokens of many rows on the device: `mor.engine.sampler` without its penalties, bans and lists.

Each row's vocabulary is cut into blocks, and each block has a program of its own: one kernel finds the blocks' largest
logits, one sums the weights that these decide, and one finds the block in which the draw ends, and the token in it. As
in the sampler, what decides is exact: sums of integer weights. Of rows with top-k or top-p a single program goes over
the vocabulary, as often as they ask, in a last kernel. A kernel leaves rows that are not its own at once.

Legend: N rows, V vocabulary, S blocks of a row, B tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.engine import plain_ops
from mor.engine.kernels.draw_filters import draw_limited, read, scale, weight
from mor.engine.kernels.launch import kernel, runs_kernel

BLOCK = 2048
"""Tokens of a block. A program of 4 warps has 16 of them a thread, and a row of 49,152 has 24 programs."""

NUM_WARPS = 4
_LIMITED_WARPS = 16  # of the one program that filters a row, in blocks of twice the size
_STRIDES = ["t_stride", "k_stride", "p_stride", "m_stride", "s_stride", "i_stride"]


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
def _survey_blocks(logits_NV, peak_NS, total_NS, row_stride, num_blocks, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """A block's largest logit, infinity if it holds NaN, and the sum of the exponentials relative to it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, x_B = read(logits_NV + row * row_stride, block * BLOCK_B, SIZE, BLOCK_B)
    x_B = tl.where(x_B == x_B, x_B, float("inf"))
    peak = tl.max(x_B, 0)
    base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # no infinity less itself
    place = row * num_blocks + block
    tl.store(peak_NS + place, peak)
    tl.store(total_NS + place, tl.sum(tl.exp(tl.minimum(x_B - base, 0.0)), 0))


@kernel
def _row_of_blocks(peak_NS, row, num_blocks, PAD_S: tl.constexpr):
    """Where a row's blocks stand, which there are, their peaks, the largest, and whether a token can be chosen."""
    block_S = tl.arange(0, PAD_S)
    place_S, is_in_S = row * num_blocks + block_S, block_S < num_blocks
    peak_S = tl.load(peak_NS + place_S, mask=is_in_S, other=float("-inf"))
    largest = tl.max(peak_S, 0)
    return place_S, is_in_S, peak_S, largest, tl.abs(largest) < float("inf")


@kernel
def _is_limited(top_k, top_p, SIZE: tl.constexpr):
    return ((top_k > 0) & (top_k < SIZE)) | (top_p < 1)


@kernel
def _lightest(min_p):
    """The least weight that min-p keeps: as weights are integers, its share of 2**40 rounded up."""
    return tl.ceil(min_p.to(tl.float64) * 1099511627776.0).to(tl.int64)


@kernel
def _weights(logits_V, first, largest, temperature, lightest, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Weights of a block of a row without top-k and top-p."""
    _, _, x_B = read(logits_V, first, SIZE, BLOCK_B)
    weight_B = weight(scale(x_B, largest, temperature))
    return tl.where(weight_B >= lightest, weight_B, 0)


@kernel(do_not_specialize=[*_STRIDES[:4], "num_blocks"])
def _weigh_blocks(
    logits_NV,
    temperature_N,
    top_k_N,
    top_p_N,
    min_p_N,
    peak_NS,
    mass_NS,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    m_stride,
    num_blocks,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """What a block's tokens weigh, of rows that draw without top-k and top-p."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_N + row * t_stride).to(tl.float64)
    is_limited = _is_limited(tl.load(top_k_N + row * k_stride), tl.load(top_p_N + row * p_stride), SIZE)
    _, _, _, largest, is_sound = _row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    if (temperature > 0) & is_sound & (is_limited == 0):
        lightest = _lightest(tl.load(min_p_N + row * m_stride))
        logits_V = logits_NV + row * row_stride
        weight_B = _weights(logits_V, block * BLOCK_B, largest, temperature, lightest, SIZE, BLOCK_B)
        tl.store(mass_NS + row * num_blocks + block, tl.sum(weight_B, 0))


@kernel
def _found(
    logits_V,
    mass_S,
    largest,
    temperature,
    lightest,
    uniform,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """The first token at which the running sum of the weights is more than `uniform` of their total."""
    target = (uniform * tl.sum(mass_S, 0).to(tl.float64)).to(tl.int64)
    block = tl.sum((tl.cumsum(mass_S, 0) <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(tl.arange(0, PAD_S) < block, mass_S, 0), 0)
    weight_B = _weights(logits_V, block * BLOCK_B, largest, temperature, lightest, SIZE, BLOCK_B)
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


@kernel(do_not_specialize=[*_STRIDES, "num_blocks"])
def _choose_tokens(
    logits_NV,
    temperature_N,
    top_k_N,
    top_p_N,
    min_p_N,
    seed_N,
    index_N,
    peak_NS,
    total_NS,
    mass_NS,
    token_N,
    logprob_N,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    m_stride,
    s_stride,
    i_stride,
    num_blocks,
    LIMITED: tl.constexpr,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAD_S: tl.constexpr,
):
    """A row's token and its log-probability: of rows that draw with top-k or top-p if `LIMITED`, else of others."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * row_stride
    temperature = tl.load(temperature_N + row * t_stride).to(tl.float64)
    top_k, top_p = tl.load(top_k_N + row * k_stride), tl.load(top_p_N + row * p_stride).to(tl.float64)
    place_S, is_in_S, peak_S, largest, is_sound = _row_of_blocks(peak_NS, row, num_blocks, PAD_S)
    is_limited = _is_limited(top_k, top_p, SIZE) & (temperature > 0) & is_sound
    if is_limited != LIMITED:
        return
    token, logprob = tl.full([], -1, tl.int32), tl.full([], float("nan"), tl.float32)
    if is_sound:
        if temperature > 0:
            uniform = _uniform(tl.load(seed_N + row * s_stride), tl.load(index_N + row * i_stride))
            lightest = _lightest(tl.load(min_p_N + row * m_stride))
            if LIMITED:
                token = draw_limited(
                    logits_V, largest, temperature, top_k, top_p, lightest, uniform, SIZE, SHIFT, BLOCK_B
                )
            else:
                mass_S = tl.load(mass_NS + place_S, mask=is_in_S, other=0)
                token = _found(logits_V, mass_S, largest, temperature, lightest, uniform, SIZE, BLOCK_B, PAD_S)
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
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The next token (N,) int64 of each row and its log-probability (N,) float32, as `mor.engine.sampler.sample` has
    them for `SamplingParams` of these numbers.

    Log-probabilities are of the logits as they came. Token -1 and NaN where the logits hold NaN or infinity or leave no
    token to choose. The six tensors may have any stride, and integers and floats of any width. Raises ValueError for
    what the kernel cannot read.
    """
    rows = (temperature_N, top_k_N, top_p_N, min_p_N, seed_N, index_N)
    if not runs_kernel(logits_NV):
        return plain_ops.draw_tokens(logits_NV, *rows)
    if logits_NV.stride(1) != 1 or logits_NV.dtype == torch.float64:
        raise ValueError(f"logits of {logits_NV.dtype} and strides {logits_NV.stride()} are not rows of single floats")
    if any(len(each) != len(logits_NV) or each.device != logits_NV.device for each in rows):
        raise ValueError(f"each of {[tuple(each.shape) for each in rows]} must have {len(logits_NV)} rows")
    if block < 16 or block & (block - 1):
        raise ValueError(f"block={block} must be a power of two, at least 16")
    token_N = torch.empty(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    logprob_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    if len(logits_NV):
        _launch(logits_NV, rows, token_N, logprob_N, block)
    return token_N, logprob_N


def _launch(logits_NV: Tensor, rows: tuple[Tensor, ...], token_N: Tensor, logprob_N: Tensor, block: int) -> None:
    num_rows, size = logits_NV.shape
    fits = max(16, 1 << (size - 1).bit_length())
    block, limited_block = min(block, fits), min(2 * block, fits)
    num_blocks = -(-size // block)
    grid = num_rows, num_blocks
    peak_NS, total_NS, mass_NS = (
        torch.empty(grid, dtype=dtype, device=logits_NV.device) for dtype in (torch.float32, torch.float32, torch.int64)
    )
    strides = logits_NV.stride(0), *(each.stride(0) for each in rows)
    _survey_blocks[grid](
        *(logits_NV, peak_NS, total_NS, strides[0], num_blocks), SIZE=size, BLOCK_B=block, num_warps=NUM_WARPS
    )
    shape = dict(SIZE=size, PAD_S=triton.next_power_of_2(num_blocks))
    _weigh_blocks[grid](
        *(logits_NV, *rows[:4], peak_NS, mass_NS, *strides[:5], num_blocks),
        **shape,
        BLOCK_B=block,
        num_warps=NUM_WARPS,
    )
    for is_limited, taken, warps in ((False, block, NUM_WARPS), (True, limited_block, _LIMITED_WARPS)):
        _choose_tokens[(num_rows,)](
            *(logits_NV, *rows, peak_NS, total_NS, mass_NS, token_N, logprob_N, *strides, num_blocks),
            **shape,
            LIMITED=is_limited,
            SHIFT=16 if logits_NV.dtype == torch.bfloat16 else 0,
            BLOCK_B=taken,
            num_warps=warps,
        )
