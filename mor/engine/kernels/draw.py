"""The next tokens of many rows on the device: `mor.engine.sampler` without its penalties, bans and lists.

One program a row goes over the vocabulary in blocks, as often as the row's filters ask. As in the sampler, what decides
is exact: sums of integer weights.

Legend: N rows, V vocabulary, B tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.engine import plain_ops
from mor.engine.kernels.draw_filters import limit, read, scale, weight
from mor.engine.kernels.launch import kernel, runs_kernel

BLOCK = 4096
NUM_WARPS = 16
_STRIDES = ["row_stride", "t_stride", "k_stride", "p_stride", "m_stride", "s_stride", "i_stride"]


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
    weight_B = tl.where(is_kept_B & (weight_B.to(tl.float64) >= lightest), weight_B, 0)
    return weight_B, room - num_equal


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


@kernel
def _drawn(
    logits_V,
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The first token at which the running sum of the weights is more than `uniform` of their total."""
    least, room = tl.full([], float("-inf"), tl.float64), tl.full([], SIZE, tl.int32)
    if ((top_k > 0) & (top_k < SIZE)) | (top_p < 1):
        least, room = limit(logits_V, top_k, top_p, largest, temperature, SIZE, SHIFT, BLOCK_B)
    lightest = min_p * 1099511627776.0
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


@kernel
def _survey(logits_V, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """The largest logit, the first token that has it, the sum of exponentials relative to it, and the number of NaN.

    Each lane keeps its own of all four until the end, so that blocks need not wait for each other.
    """
    largest_B, total_B = tl.full([BLOCK_B], float("-inf"), tl.float32), tl.zeros([BLOCK_B], tl.float32)
    best_B, num_nan_B = tl.full([BLOCK_B], SIZE, tl.int32), tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, SIZE, BLOCK_B):
        token_B, _, x_B = read(logits_V, first, SIZE, BLOCK_B)
        num_nan_B += (x_B != x_B).to(tl.int32)
        x_B = tl.where(x_B == x_B, x_B, float("-inf"))
        best_B = tl.where(x_B > largest_B, token_B, best_B)
        peak_B = tl.maximum(largest_B, x_B)
        base_B = tl.where(tl.abs(peak_B) < float("inf"), peak_B, 0.0)  # no infinity less itself
        total_B = total_B * tl.exp(largest_B - base_B) + tl.exp(x_B - base_B)
        largest_B = peak_B
    largest = tl.max(largest_B, 0)
    base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    total = tl.sum(total_B * tl.exp(largest_B - base), 0)
    best = tl.min(tl.where(largest_B == largest, best_B, SIZE), 0)
    return largest, best, total, tl.sum(num_nan_B, 0)


@kernel(do_not_specialize=_STRIDES)
def _draw_tokens(
    logits_NV,
    temperature_N,
    top_k_N,
    top_p_N,
    min_p_N,
    seed_N,
    index_N,
    token_N,
    logprob_N,
    row_stride,
    t_stride,
    k_stride,
    p_stride,
    m_stride,
    s_stride,
    i_stride,
    SIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * row_stride
    largest, token, total, num_nan = _survey(logits_V, SIZE, BLOCK_B)
    logprob = tl.full([], float("nan"), tl.float32)
    if (num_nan > 0) | (largest == float("inf")) | (largest == float("-inf")):
        token = tl.full([], -1, tl.int32)
    else:
        temperature = tl.load(temperature_N + row * t_stride).to(tl.float64)
        if temperature > 0:
            uniform = _uniform(tl.load(seed_N + row * s_stride), tl.load(index_N + row * i_stride))
            token = _drawn(
                logits_V,
                largest,
                temperature,
                tl.load(top_k_N + row * k_stride),
                tl.load(top_p_N + row * p_stride).to(tl.float64),
                tl.load(min_p_N + row * m_stride).to(tl.float64),
                uniform,
                SIZE,
                SHIFT,
                BLOCK_B,
            )
        logprob = tl.load(logits_V + token).to(tl.float32) - largest - tl.log(total)
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
        _draw_tokens[(len(logits_NV),)](
            logits_NV,
            *rows,
            token_N,
            logprob_N,
            logits_NV.stride(0),
            *(each.stride(0) for each in rows),
            SIZE=logits_NV.shape[1],
            SHIFT=16 if logits_NV.dtype == torch.bfloat16 else 0,
            BLOCK_B=min(block, max(16, triton.next_power_of_2(logits_NV.shape[1]))),
            num_warps=NUM_WARPS,
        )
    return token_N, logprob_N
