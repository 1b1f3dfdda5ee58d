"""Linear layers of a few rows, made to read weights at the speed of memory, with what stands around them folded in.

A decode step of a few sequences waits for weights and for launches. With the norm in front of a product, and SwiGLU or
the residual behind it, a layer is four of these and attention.

Legend: N rows, K input features, M output features, F those that a gate leaves, C input features and R output features
taken at a time: by each of W warps J. A vector is read as W rows that are all the same, so that it is laid out over the
threads as the weights are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mor.engine import plain_ops
from mor.engine.kernels.launch import early_step, kernel, runs_kernel
from mor.engine.kernels.linear import check_linear

MAX_ROWS = 8
"""With more, a matrix product of the usual kind is faster."""

BLOCK = 4
NUM_WARPS = 4
_CHUNK = 256  # features that a warp reads at once, 16 bytes a thread
_AHEAD_BYTES = 6144  # of a row of the weight, read before the wait: 48 registers a thread


@kernel
def _read(matrix_YK, row_WJ, is_row_WJ, first, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """A chunk of rows of a matrix, (W, J, C)."""
    feature_C = first + tl.arange(0, BLOCK_C)[None, None, :]
    where_WJC = matrix_YK + row_WJ[:, :, None].to(tl.int64) * K + feature_C
    return tl.load(where_WJC, mask=is_row_WJ[:, :, None] & (feature_C < K), other=0.0)


@kernel
def _read_all(matrix_YK, row_WJ, is_row_WJ, K: tl.constexpr, MOST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Chunks of the first `MOST` features or all, each on its way before the first is used."""
    parts = ()
    for first in tl.static_range(0, min(K, MOST), BLOCK_C):  # pyright: ignore
        parts += (_read(matrix_YK, row_WJ, is_row_WJ, first, K, BLOCK_C),)
    return parts


@kernel
def _normed(x_parts, norm_parts, eps, W: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """RMSNorm of a row, rounded."""
    square_W1C = tl.zeros([W, 1, BLOCK_C], tl.float32)
    for c in tl.static_range(len(x_parts)):
        square_W1C += x_parts[c].to(tl.float32) * x_parts[c].to(tl.float32)
    root_W1 = tl.rsqrt(tl.sum(square_W1C, 2) / K + eps)
    parts = ()
    for c in tl.static_range(len(x_parts)):
        x_W1C = x_parts[c].to(tl.float32) * root_W1[:, :, None] * norm_parts[c].to(tl.float32)
        parts += (x_W1C.to(x_parts[c].dtype),)
    return parts


@kernel
def _product(
    x_parts,
    weight_parts,
    weight_MK,
    row_WJ,
    is_row_WJ,
    J: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A row of x times rows of the weight, in float32; what was not read ahead is read now."""
    sum_WJC = tl.zeros([W, J, BLOCK_C], tl.float32)
    for c in tl.static_range(len(x_parts)):
        if c < len(weight_parts):
            weight_WJC = weight_parts[c]
        else:
            weight_WJC = _read(weight_MK, row_WJ, is_row_WJ, c * BLOCK_C, K, BLOCK_C)
        sum_WJC += weight_WJC.to(tl.float32) * x_parts[c].to(tl.float32)
    return tl.reshape(tl.sum(sum_WJC, 2), [W * J])


@kernel
def _linear_small(
    x_NK,
    weight_MK,
    bias_M,
    norm_K,
    out_NF,
    eps,
    PARTS: tl.constexpr,
    ADDS: tl.constexpr,
    EARLY: tl.constexpr,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    W: tl.constexpr,
):
    """A few output features of all rows; of two parts, a gate's, R alternates between rows of its two halves."""
    offset_R = tl.arange(0, PARTS * BLOCK_F)
    feature_R = tl.program_id(0) * BLOCK_F + offset_R // PARTS
    row_R, is_row_R = feature_R + offset_R % PARTS * SIZE, feature_R < SIZE
    J: tl.constexpr = PARTS * BLOCK_F // W
    offset_WJ = tl.arange(0, W)[:, None] * J + tl.arange(0, J)[None, :]
    feature_WJ = tl.program_id(0) * BLOCK_F + offset_WJ // PARTS
    row_WJ, is_row_WJ = feature_WJ + offset_WJ % PARTS * SIZE, feature_WJ < SIZE
    first_W1 = tl.arange(0, W)[:, None] * 0
    number_N = tl.arange(0, PAD_N)
    feature_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    place_NF = out_NF + number_N[:, None] * SIZE + feature_F[None, :]
    is_in_NF = (number_N < N)[:, None] & (feature_F < SIZE)[None, :]
    if EARLY == 2:
        gdc_launch_dependents()
    weight_parts = _read_all(weight_MK, row_WJ, is_row_WJ, K, MOST, BLOCK_C)
    if norm_K is not None:
        norm_parts = _read_all(norm_K, first_W1, first_W1 == 0, K, K, BLOCK_C)
    if EARLY:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()
    if ADDS:
        before_NF = tl.load(place_NF, mask=is_in_NF, other=0.0)
    sum_NR = tl.zeros([PAD_N, PARTS * BLOCK_F], tl.float32)
    for n in tl.static_range(N):
        x_parts = _read_all(x_NK + n * K, first_W1, first_W1 == 0, K, K, BLOCK_C)
        if norm_K is not None:
            x_parts = _normed(x_parts, norm_parts, eps, W, K, BLOCK_C)
        sum_R = _product(x_parts, weight_parts, weight_MK, row_WJ, is_row_WJ, J, W, K, BLOCK_C)
        sum_NR += tl.where((number_N == n)[:, None], sum_R[None, :], 0.0)
    if bias_M is not None:
        sum_NR += tl.load(bias_M + row_R, mask=is_row_R, other=0.0).to(tl.float32)[None, :]
    dtype = out_NF.dtype.element_ty
    out = sum_NR.to(dtype)
    if PARTS == 2:
        gate_NF, up_NF = tl.split(tl.reshape(out, [PAD_N, BLOCK_F, 2]))
        wide_NF = gate_NF.to(tl.float32)
        gate_NF = (wide_NF / (1.0 + tl.exp(-wide_NF))).to(dtype)
        out = (gate_NF.to(tl.float32) * up_NF.to(tl.float32)).to(dtype)
    if ADDS:
        out = (before_NF.to(tl.float32) + out.to(tl.float32)).to(dtype)
    tl.store(place_NF, out, mask=is_in_NF)


def linear_small(
    x_NK: Tensor,
    weight_MK: Tensor,
    *,
    bias_M: Tensor | None = None,
    norm_K: Tensor | None = None,
    eps: float = 1e-5,
    gated: bool = False,
    onto_NM: Tensor | None = None,
    block: int | None = None,
    num_warps: int = NUM_WARPS,
    early: int | None = None,
) -> Tensor:
    """`x_NK` times the transpose of `weight_MK`, for at most `MAX_ROWS` rows: (N, M), or (N, M/2) if `gated`.

    In this order, each rounded to the dtype as its own operation would be, with sums in float32: RMSNorm of x with
    weight `norm_K` and `eps`; the product plus `bias_M`; silu(first half) * second half if `gated`; the sum with
    `onto_NM`, in place, which is then what is returned. `block` features a program, `num_warps` and `early` (see
    `launch.early_step`) are for tuning. Raises ValueError for what the kernel cannot read.
    """
    if not runs_kernel(x_NK):
        return plain_ops.linear_small(
            x_NK, weight_MK, bias_M=bias_M, norm_K=norm_K, eps=eps, gated=gated, onto_NM=onto_NM
        )
    check_linear(x_NK, weight_MK, bias_M, norm_K, onto_NM, gated=gated, max_rows=MAX_ROWS)
    num_rows, size = len(x_NK), len(weight_MK) // 2 if gated else len(weight_MK)
    out_NF = torch.empty(num_rows, size, device=x_NK.device, dtype=x_NK.dtype) if onto_NM is None else onto_NM
    block = block or (2 * BLOCK if gated and num_rows == 1 else BLOCK)
    early = early_step(x_NK, is_first=norm_K is not None and not gated) if early is None else early
    if num_rows:
        _linear_small[(-(-size // block),)](
            x_NK,
            weight_MK,
            bias_M,
            norm_K,
            out_NF,
            eps,
            PARTS=2 if gated else 1,
            ADDS=onto_NM is not None,
            EARLY=early,
            N=num_rows,
            PAD_N=triton.next_power_of_2(num_rows),
            K=x_NK.shape[1],
            SIZE=size,
            MOST=_AHEAD_BYTES // x_NK.element_size(),
            BLOCK_C=_CHUNK,
            BLOCK_F=block,
            W=min(num_warps, block * (2 if gated else 1)),
            num_warps=num_warps,
            launch_pdl=early > 0,
        )
    return out_NF
