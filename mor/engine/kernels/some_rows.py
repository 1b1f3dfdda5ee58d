"""Linear layers of tens of rows on matrix units, with what stands around them folded in.

A decode step of tens of sequences waits for launches and for the latency of memory more than for its bandwidth. A
program has all rows and a few output features; each of its warps multiplies slices of the input features of its own,
so that no chain of dependent products is long, and the warps' sums are added at the end.

Legend: N rows, K input features, M output features, F those that a gate leaves, R rows of the weight in a program, S
slices of input features, one a warp, C features of a slice, L cache lines of a row of the weight.
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

MAX_ROWS = 64
"""With more, a matrix product of the usual kind is faster."""

BLOCK = 16
NUM_WARPS = 8

_LINE_BYTES = 128  # what a warp reads of a row at a time, and what a cache holds of it
_SHARED_BYTES = 216 * 1024  # what a multiprocessor has for parts of x and of the weight that are on their way
_PROCESSORS = 132
_ROOT_CHUNK = tl.constexpr(256)  # features that a warp reads at once, 16 bytes a thread


@kernel
def _fetch(weight_MK, row_R, K: tl.constexpr, LINE: tl.constexpr, PAD_L: tl.constexpr):
    """Starts moving rows of the weight to the L2 cache; nobody waits for them here."""
    feature_L = tl.minimum(tl.arange(0, PAD_L) * LINE, K - 1)
    where_RL = (weight_MK + row_R[:, None].to(tl.int64) * K + feature_L[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where_RL], dtype=tl.int32, is_pure=False, pack=1
    )


@kernel
def _root(x_NK, row_N, is_row_N, eps, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """What RMSNorm multiplies each row of x with. A warp has whole rows, so none waits for another."""
    square_NC = tl.zeros([row_N.shape[0], BLOCK_C], tl.float32)
    for first in tl.static_range(0, K, BLOCK_C):
        feature_C = first + tl.arange(0, BLOCK_C)
        where_NC = x_NK + row_N[:, None] * K + feature_C[None, :]
        x_NC = tl.load(where_NC, mask=is_row_N[:, None] & (feature_C < K)[None, :], other=0.0).to(tl.float32)
        square_NC += x_NC * x_NC
    return tl.rsqrt(tl.sum(square_NC, 1) / K + eps)


@kernel
def _tile(matrix_YK, row_Y, is_row_Y, feature_SC, K: tl.constexpr):
    """Slices of rows of a matrix, (S, Y, C)."""
    where_SYC = matrix_YK + row_Y[None, :, None].to(tl.int64) * K + feature_SC[:, None, :]
    return tl.load(where_SYC, mask=is_row_Y[None, :, None] & (feature_SC < K)[:, None, :], other=0.0)


@kernel
def _sum_slices(sum_SNR):
    """Halves added to halves until one is left, which leaves each warp a part of it rather than all."""
    if sum_SNR.shape[0] > 1:
        halves = tl.reshape(sum_SNR, [2, sum_SNR.shape[0] // 2, sum_SNR.shape[1], sum_SNR.shape[2]])
        first_SNR, second_SNR = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        sum_SNR = _sum_slices(first_SNR + second_SNR)
    return sum_SNR


@kernel
def _product(
    x_NK,
    weight_MK,
    norm_K,
    root_N,
    row_R,
    is_row_R,
    row_N,
    is_row_N,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """All rows times rows of the weight, (N, R), in float32, with later slices on their way to the ones at hand."""
    feature_SC = tl.arange(0, SLICES)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum_SNR = tl.zeros([SLICES, row_N.shape[0], row_R.shape[0]], tl.float32)
    for first in tl.range(0, K, SLICES * BLOCK_C, num_stages=NUM_STAGES):
        weight_SRC = _tile(weight_MK, row_R, is_row_R, first + feature_SC, K)
        x_SNC = _tile(x_NK, row_N, is_row_N, first + feature_SC, K)
        if norm_K is not None:
            scale_SC = tl.load(norm_K + first + feature_SC, mask=first + feature_SC < K, other=0.0).to(tl.float32)
            x_SNC = (x_SNC.to(tl.float32) * root_N[None, :, None] * scale_SC[:, None, :]).to(x_SNC.dtype)
        sum_SNR = tl.dot(x_SNC, tl.permute(weight_SRC, (0, 2, 1)), sum_SNR, input_precision="ieee")
    return tl.reshape(_sum_slices(sum_SNR), [row_N.shape[0], row_R.shape[0]])


@kernel(do_not_specialize=["num_rows"])
def _linear_some(
    x_NK,
    weight_MK,
    bias_M,
    norm_K,
    out_NF,
    eps,
    num_rows,
    PARTS: tl.constexpr,
    ADDS: tl.constexpr,
    EARLY: tl.constexpr,
    FETCHES: tl.constexpr,
    PAD_N: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAD_L: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """A few output features of all rows; of two parts, a gate's, R alternates between rows of its two halves."""
    offset_R = tl.arange(0, PARTS * BLOCK_F)
    feature_R = tl.program_id(0) * BLOCK_F + offset_R // PARTS
    row_R, is_row_R = feature_R + offset_R % PARTS * SIZE, feature_R < SIZE
    if EARLY == 2:
        gdc_launch_dependents()
    if FETCHES:
        _fetch(weight_MK, tl.where(is_row_R, row_R, 0), K, BLOCK_C, PAD_L)
    if EARLY:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()
    row_N = tl.arange(0, PAD_N)
    is_row_N = row_N < num_rows
    dtype = out_NF.dtype.element_ty
    feature_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    place_NF = out_NF + row_N[:, None] * SIZE + feature_F[None, :]
    is_in_NF = is_row_N[:, None] & (feature_F < SIZE)[None, :]
    if ADDS:
        before_NF = tl.load(place_NF, mask=is_in_NF, other=0.0)
    root_N = row_N * 0.0
    if norm_K is not None:
        root_N = _root(x_NK, row_N, is_row_N, eps, K, _ROOT_CHUNK)
    sum_NR = _product(x_NK, weight_MK, norm_K, root_N, row_R, is_row_R, row_N, is_row_N, K, SLICES, BLOCK_C, NUM_STAGES)
    if bias_M is not None:
        sum_NR += tl.load(bias_M + row_R, mask=is_row_R, other=0.0).to(tl.float32)[None, :]
    out = sum_NR.to(dtype)
    if PARTS == 2:
        gate_NF, up_NF = tl.split(tl.reshape(out, [PAD_N, BLOCK_F, 2]))
        wide_NF = gate_NF.to(tl.float32)
        gate_NF = (wide_NF / (1.0 + tl.exp(-wide_NF))).to(dtype)
        out = (gate_NF.to(tl.float32) * up_NF.to(tl.float32)).to(dtype)
    if ADDS:
        out = (before_NF.to(tl.float32) + out.to(tl.float32)).to(dtype)
    tl.store(place_NF, out, mask=is_in_NF)


def linear_some(
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
    num_stages: int | None = None,
    early: int | None = None,
) -> Tensor:
    """`few_rows.linear_small` for at most `MAX_ROWS` rows: the same arguments, result, roundings and errors.

    A row's result depends on that row alone, and on whether 16, 32 or 64 rows hold all. `block` features a program,
    `num_warps` (a power of two), chunks on their way (`num_stages` - 1, by default as many as fit) and `early` (see
    `launch.early_step`) are for tuning.
    """
    if not runs_kernel(x_NK):
        return plain_ops.linear_small(
            x_NK, weight_MK, bias_M=bias_M, norm_K=norm_K, eps=eps, gated=gated, onto_NM=onto_NM
        )
    check_linear(x_NK, weight_MK, bias_M, norm_K, onto_NM, gated=gated, max_rows=MAX_ROWS)
    (num_rows, width), parts = x_NK.shape, 2 if gated else 1
    size = len(weight_MK) // parts
    out_NF = torch.empty(num_rows, size, device=x_NK.device, dtype=x_NK.dtype) if onto_NM is None else onto_NM
    early = early_step(x_NK, is_first=norm_K is not None and not gated) if early is None else early
    if num_rows:
        pad_rows, programs = max(16, 1 << (num_rows - 1).bit_length()), -(-size // block)
        line, row_bytes = _LINE_BYTES // x_NK.element_size(), width * x_NK.element_size()
        fetches = x_NK.is_cuda  # the interpreter has no caches
        _linear_some[(programs,)](
            x_NK,
            weight_MK,
            bias_M,
            norm_K,
            out_NF,
            eps,
            num_rows,
            PARTS=parts,
            ADDS=onto_NM is not None,
            EARLY=early,
            FETCHES=fetches,
            PAD_N=pad_rows,
            K=width,
            SIZE=size,
            BLOCK_F=block,
            SLICES=num_warps,
            BLOCK_C=line,
            PAD_L=triton.next_power_of_2(-(-width // line)),
            NUM_STAGES=num_stages or _stages(row_bytes, pad_rows + parts * block, programs, num_warps * _LINE_BYTES),
            num_warps=num_warps,
            launch_pdl=early > 0,
        )
    return out_NF


def _stages(row_bytes: int, num_rows: int, programs: int, chunk_bytes: int) -> int:
    """Stages of a loop over chunks of rows of so many bytes; `num_rows` of x and of the weight together."""
    at_once = min(2, -(-programs // _PROCESSORS))
    fitting = _SHARED_BYTES // at_once // (num_rows * chunk_bytes)
    return 1 + max(1, min(-(-row_bytes // chunk_bytes), fitting))
