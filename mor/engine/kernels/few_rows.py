"""Linear layers of a few rows, made to read weights at the speed of memory, with what stands around them folded in.

A decode step of a few sequences waits for weights and for launches. With the norm in front of a product, and SwiGLU or
the residual behind it, a layer is four of these and attention.

Legend: N rows, K input features, M output features, F those that a gate leaves, C input features and R output features
taken at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mor.engine import plain_ops
from mor.engine.kernels.launch import kernel, runs_kernel
from mor.engine.kernels.linear import check_linear

MAX_ROWS = 8
"""With more, a matrix product of the usual kind is faster."""

BLOCK = 4
NUM_WARPS = 4
_CHUNK = 256  # features that a warp reads at once, 16 bytes a thread


@kernel
def _read(vector_K, row_R, first, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """A part of a vector, once for every row: laid out as the weights are, it need not pass between threads."""
    feature_RC = (first + tl.arange(0, BLOCK_C))[None, :] + (row_R * 0)[:, None]
    return tl.load(vector_K + feature_RC, mask=feature_RC < K, other=0.0)


@kernel
def _root(x_K, row_R, eps, K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """What RMSNorm multiplies a row of x with, once for every row of the weight."""
    square_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in tl.static_range(0, K, BLOCK_C):
        x_RC = _read(x_K, row_R, first, K, BLOCK_C).to(tl.float32)
        square_RC += x_RC * x_RC
    return tl.rsqrt(tl.sum(square_RC, 1) / K + eps)


@kernel
def _product(
    x_K, weight_MK, norm_K, row_R, is_row_R, eps, K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """A row of x times rows `row_R` of the weight, in float32. A warp has whole rows, so none waits for another."""
    root_R = tl.zeros([BLOCK_R], tl.float32)
    if norm_K is not None:
        root_R = _root(x_K, row_R, eps, K, BLOCK_C, BLOCK_R)
    sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in tl.static_range(0, K, BLOCK_C):
        feature_C = first + tl.arange(0, BLOCK_C)
        where_RC = weight_MK + row_R[:, None].to(tl.int64) * K + feature_C[None, :]
        weight_RC = tl.load(where_RC, mask=is_row_R[:, None] & (feature_C < K)[None, :], other=0.0)
        x_RC = _read(x_K, row_R, first, K, BLOCK_C)
        if norm_K is not None:
            scale_RC = _read(norm_K, row_R, first, K, BLOCK_C).to(tl.float32)
            x_RC = (x_RC.to(tl.float32) * root_R[:, None] * scale_RC).to(x_RC.dtype)
        sum_RC += weight_RC.to(tl.float32) * x_RC.to(tl.float32)
    return tl.sum(sum_RC, 1)


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
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """A few output features of all rows; of two parts, a gate's, R alternates between rows of its two halves."""
    offset_R = tl.arange(0, PARTS * BLOCK_F)
    feature_R = tl.program_id(0) * BLOCK_F + offset_R // PARTS
    row_R, is_row_R = feature_R + offset_R % PARTS * SIZE, feature_R < SIZE
    number_N = tl.arange(0, PAD_N)
    sum_NR = tl.zeros([PAD_N, PARTS * BLOCK_F], tl.float32)
    for n in tl.static_range(N):
        sum_R = _product(x_NK + n * K, weight_MK, norm_K, row_R, is_row_R, eps, K, BLOCK_C, PARTS * BLOCK_F)
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
    feature_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    place_NF = out_NF + number_N[:, None] * SIZE + feature_F[None, :]
    is_in_NF = (number_N < N)[:, None] & (feature_F < SIZE)[None, :]
    if ADDS:
        before_NF = tl.load(place_NF, mask=is_in_NF, other=0.0)
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
    block: int = BLOCK,
    num_warps: int = NUM_WARPS,
) -> Tensor:
    """`x_NK` times the transpose of `weight_MK`, for at most `MAX_ROWS` rows: (N, M), or (N, M/2) if `gated`.

    In this order, each rounded to the dtype as its own operation would be, with sums in float32: RMSNorm of x with
    weight `norm_K` and `eps`; the product plus `bias_M`; silu(first half) * second half if `gated`; the sum with
    `onto_NM`, in place, which is then what is returned. `block` features a program and `num_warps` are for tuning.
    Raises ValueError for what the kernel cannot read.
    """
    if not runs_kernel(x_NK):
        return plain_ops.linear_small(
            x_NK, weight_MK, bias_M=bias_M, norm_K=norm_K, eps=eps, gated=gated, onto_NM=onto_NM
        )
    check_linear(x_NK, weight_MK, bias_M, norm_K, onto_NM, gated=gated, max_rows=MAX_ROWS)
    num_rows, size = len(x_NK), len(weight_MK) // 2 if gated else len(weight_MK)
    out_NF = torch.empty(num_rows, size, device=x_NK.device, dtype=x_NK.dtype) if onto_NM is None else onto_NM
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
            N=num_rows,
            PAD_N=triton.next_power_of_2(num_rows),
            K=x_NK.shape[1],
            SIZE=size,
            BLOCK_C=_CHUNK,
            BLOCK_F=block,
            num_warps=num_warps,
        )
    return out_NF
