"""What stands between a layer's matrix products, each in one kernel: norm, rotary positions with the write to the
pages, and SwiGLU. Roundings are those of the model's own modules, operation by operation.

Legend: N rows, D hidden size, C channels of the fused projection, H query heads, G key/value heads, E head size, X
pages, P entries of a page, F feed-forward size, J heads of all kinds, I half the head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mor.engine import plain_ops
from mor.engine.kernels.launch import (
    check_pages,
    check_projection,
    check_rows,
    kernel,
    runs_kernel,
    starts_early,
)

_SWIGLU_BLOCK = 1024


@kernel
def _add_norm(x_ND, delta_ND, weight_D, h_ND, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place_D = tl.arange(0, BLOCK_D)
    is_in = place_D < D
    weight_D = tl.load(weight_D + place_D, mask=is_in, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x_D = tl.load(x_ND + row * D + place_D, mask=is_in, other=0.0)
    dtype = x_D.dtype
    x_D = x_D.to(tl.float32)
    if delta_ND is not None:
        delta_D = tl.load(delta_ND + row * D + place_D, mask=is_in, other=0.0)
        x_D = (x_D + delta_D.to(tl.float32)).to(dtype)
        tl.store(x_ND + row * D + place_D, x_D, mask=is_in)
        x_D = x_D.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps)
    tl.store(h_ND + row * D + place_D, (x_D * scale * weight_D).to(dtype), mask=is_in)


def add_norm(x_ND: Tensor, delta_ND: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds `delta_ND`, if any, to `x_ND` in place; returns it and its `torch.nn.RMSNorm` (arXiv 1910.07467).

    The sum is rounded to the dtype before the norm reads it; the norm is float32 inside. Raises ValueError for what
    the kernel cannot read.
    """
    if not runs_kernel(x_ND):
        return plain_ops.add_norm(x_ND, delta_ND, weight_D, eps)
    check_rows(x_ND, x_ND=x_ND, **({} if delta_ND is None else {"delta_ND": delta_ND}))
    size = x_ND.shape[1]
    if weight_D.shape != (size,) or (delta_ND is not None and delta_ND.shape != x_ND.shape):
        raise ValueError(f"x of shape {tuple(x_ND.shape)} and a weight of {tuple(weight_D.shape)} do not match")
    h_ND = torch.empty_like(x_ND)
    if len(x_ND):
        block = triton.next_power_of_2(size)
        warps = min(16, max(1, block // 256))
        rows, early = (x_ND, delta_ND, weight_D, h_ND), starts_early(x_ND)
        _add_norm[(len(x_ND),)](*rows, eps, D=size, BLOCK_D=block, EARLY=early, num_warps=warps, launch_pdl=early)
    return x_ND, h_ND


@kernel
def _rotate_and_store(
    qkv_NC,
    cos_NE,
    sin_NE,
    page_N,
    place_N,
    key_XPGE,
    value_XPGE,
    query_NHE,
    row_stride,
    page_stride,
    entry_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One row: its heads as first and second halves. Rounds after each operation, as tensors of the dtype do."""
    row = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = 2 * HALF
    head_J, half_I = tl.arange(0, BLOCK_J), tl.arange(0, HALF)
    place_JI = head_J[:, None] * SIZE + half_I[None, :]
    is_in = head_J[:, None] < HEADS + 2 * GROUPS
    first_JI = tl.load(qkv_NC + row * row_stride + place_JI, mask=is_in, other=0.0)
    second_JI = tl.load(qkv_NC + row * row_stride + place_JI + HALF, mask=is_in, other=0.0)
    dtype = first_JI.dtype
    a_JI, b_JI = first_JI.to(tl.float32), second_JI.to(tl.float32)
    cos_I, sin_I = cos_NE + row * SIZE + half_I, sin_NE + row * SIZE + half_I
    cos_a, cos_b = tl.load(cos_I).to(tl.float32)[None, :], tl.load(cos_I + HALF).to(tl.float32)[None, :]
    sin_a, sin_b = tl.load(sin_I).to(tl.float32)[None, :], tl.load(sin_I + HALF).to(tl.float32)[None, :]
    left_JI = (a_JI * cos_a).to(dtype).to(tl.float32) + (-b_JI * sin_a).to(dtype).to(tl.float32)
    right_JI = (b_JI * cos_b).to(dtype).to(tl.float32) + (a_JI * sin_b).to(dtype).to(tl.float32)
    left_JI, right_JI = left_JI.to(dtype), right_JI.to(dtype)
    is_query = head_J[:, None] < HEADS
    query = query_NHE + row * HEADS * SIZE + place_JI
    tl.store(query, left_JI, mask=is_query)
    tl.store(query + HALF, right_JI, mask=is_query)
    if GROUPS > 0:
        start = tl.load(page_N + row).to(tl.int64) * page_stride + tl.load(place_N + row).to(tl.int64) * entry_stride
        is_key = (head_J[:, None] >= HEADS) & (head_J[:, None] < HEADS + GROUPS)
        is_value = (head_J[:, None] >= HEADS + GROUPS) & is_in
        key = key_XPGE + start + place_JI - HEADS * SIZE
        value = value_XPGE + start + place_JI - (HEADS + GROUPS) * SIZE
        tl.store(key, left_JI, mask=is_key)
        tl.store(key + HALF, right_JI, mask=is_key)
        tl.store(value, first_JI, mask=is_value)
        tl.store(value + HALF, second_JI, mask=is_value)


def rotate_and_store(
    qkv_NC: Tensor,
    cos_NE: Tensor,
    sin_NE: Tensor,
    page_N: Tensor | None,
    place_N: Tensor | None,
    key_XPGE: Tensor | None,
    value_XPGE: Tensor | None,
    heads: int,
) -> Tensor:
    """Rotated queries (N, H, E), contiguous, of a projection `qkv_NC` that holds H queries, G keys and G values of
    each row; rotated keys, and values, go to the pages at (`page_N`, `place_N`).

    Without pages (four times None) the projection holds queries alone. Rounds as
    `mor.model.attention.rotate`. Raises ValueError for what the kernel cannot read.
    """
    if not runs_kernel(qkv_NC):
        return plain_ops.rotate_and_store(qkv_NC, cos_NE, sin_NE, page_N, place_N, key_XPGE, value_XPGE, heads)
    num_rows, size = cos_NE.shape
    groups = 0 if key_XPGE is None else key_XPGE.shape[2]
    check_projection(qkv_NC, cos_NE, sin_NE, heads, groups)
    strides = (0, 0)
    if key_XPGE is not None:
        assert value_XPGE is not None and page_N is not None and place_N is not None
        check_pages(key_XPGE, value_XPGE, size)
        check_rows(qkv_NC, page_N=page_N, place_N=place_N)
        strides = key_XPGE.stride()[:2]
    query_NHE = torch.empty(num_rows, heads, size, device=qkv_NC.device, dtype=qkv_NC.dtype)
    if num_rows:
        _rotate_and_store[(num_rows,)](
            qkv_NC,
            cos_NE,
            sin_NE,
            page_N,
            place_N,
            key_XPGE,
            value_XPGE,
            query_NHE,
            qkv_NC.stride(0),
            *strides,
            HEADS=heads,
            GROUPS=groups,
            HALF=size // 2,
            BLOCK_J=triton.next_power_of_2(heads + 2 * groups),
            num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where the model's own arithmetic rounds twice
        )
    return query_NHE


@kernel
def _swiglu(both_N2F, out_NF, row_stride, SIZE: tl.constexpr, BLOCK_F: tl.constexpr, EARLY: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    place_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_in = place_F < SIZE
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    gate_F = tl.load(both_N2F + row * row_stride + place_F, mask=is_in, other=0.0)
    up_F = tl.load(both_N2F + row * row_stride + SIZE + place_F, mask=is_in, other=0.0)
    wide_F = gate_F.to(tl.float32)
    gate_F = (wide_F / (1.0 + tl.exp(-wide_F))).to(gate_F.dtype)
    out_F = (gate_F.to(tl.float32) * up_F.to(tl.float32)).to(gate_F.dtype)
    tl.store(out_NF + row * SIZE + place_F, out_F, mask=is_in)


def swiglu(both_N2F: Tensor) -> Tensor:
    """silu(first half) * second half of each row: (N, F) (arXiv 2002.05202). silu is rounded to the dtype before the
    product. Raises ValueError for what the kernel cannot read."""
    if not runs_kernel(both_N2F):
        return plain_ops.swiglu(both_N2F)
    if both_N2F.shape[1] % 2 or both_N2F.stride(1) != 1:
        raise ValueError(
            f"rows of shape {tuple(both_N2F.shape)} and strides {both_N2F.stride()} do not hold two halves each"
        )
    num_rows, size = len(both_N2F), both_N2F.shape[1] // 2
    out_NF = torch.empty(num_rows, size, device=both_N2F.device, dtype=both_N2F.dtype)
    if num_rows:
        block = min(_SWIGLU_BLOCK, triton.next_power_of_2(size))
        grid = (-(-size // block), num_rows)
        early = starts_early(both_N2F)
        shape = dict(SIZE=size, BLOCK_F=block, EARLY=early, launch_pdl=early)
        _swiglu[grid](both_N2F, out_NF, both_N2F.stride(0), **shape, num_warps=4)
    return out_NF
