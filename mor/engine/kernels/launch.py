"""Where the kernels run, and what they ask of their tensors.

Legend: N rows, R recursions, C channels of the fused projection, X pages, P entries of a page, H query heads, G
key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from mor.engine.kv_store import Overlay

VERY_FEW_ROWS = 2
"""So many rows or fewer have programs of their own, which wait less: products that read a weight row by row, attention
in larger tiles. They round otherwise than those of more rows."""

kernel: Callable[..., Any] = triton.jit
"""Triton's decorator without its types, which know no launch options such as `num_warps`."""


def runs_kernel(tensor: Tensor) -> bool:
    """Whether a kernel can read the tensor; its twin can in any case."""
    return tensor.is_cuda


def starts_early(tensor: Tensor) -> bool:
    """Whether a kernel on the tensor's device can start before the one ahead of it ends (programmatic dependent
    launch, from compute capability 9.0).

    Until its `gdc_wait`, such a kernel uses nothing but weights, which no kernel writes; and attention reads tables to
    have entries fetched to a cache, which were written before the product ahead of it: see `early_step`. It waits in
    every program, so that when it ends all kernels before it have.
    """
    return tensor.is_cuda and _starts_early(tensor.device)


def early_step(tensor: Tensor, *, is_first: bool) -> int:
    """How a product starts: 0, when the kernel ahead has ended; 1, before, but the kernel behind it after its wait, as
    the first of a layer does; 2, both before."""
    return (1 if is_first else 2) if starts_early(tensor) else 0


@cache
def _starts_early(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def check_heads(query_RHE: Tensor, key_XPGE: Tensor, value_XPGE: Tensor) -> None:
    """Raises ValueError for queries and pages that the attention kernels cannot read."""
    heads, size = query_RHE.shape[1:]
    check_head_size(size)
    if query_RHE.stride()[1:] != (size, 1):
        raise ValueError(f"queries of strides {query_RHE.stride()} do not hold a row's heads one after another")
    check_pages(key_XPGE, value_XPGE, size)
    groups = key_XPGE.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly")
    if key_XPGE.dtype != query_RHE.dtype:
        raise ValueError(f"queries of {query_RHE.dtype} cannot read pages of {key_XPGE.dtype}; make both the same")


def check_head_size(size: int) -> None:
    """Raises ValueError unless the head size is a power of two, at least 16."""
    if size < 16 or size & (size - 1):
        raise ValueError(f"head size {size} must be a power of two, at least 16")


def check_pages(key_XPGE: Tensor, value_XPGE: Tensor, size: int) -> None:
    """Raises ValueError unless keys and values are views of one pool, with the heads of an entry lying together."""
    if key_XPGE.shape != value_XPGE.shape or key_XPGE.shape[3] != size:
        shapes = tuple(key_XPGE.shape), tuple(value_XPGE.shape)
        raise ValueError(f"pages of shapes {shapes[0]} and {shapes[1]} do not hold heads of size {size} alike")
    strides = key_XPGE.stride(), value_XPGE.stride()
    if strides[0] != strides[1] or strides[0][2:] != (size, 1) or key_XPGE.dtype != value_XPGE.dtype:
        raise ValueError(f"keys of strides {strides[0]} and values of strides {strides[1]} are not views of one pool")


def check_rows(like: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError unless every tensor is contiguous, has as many rows as `like` and is on its device."""
    for name, tensor in tensors.items():
        if len(tensor) != len(like) or not tensor.is_contiguous() or tensor.device != like.device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device} must be "
                f"contiguous, of {len(like)} rows on {like.device}"
            )


def overlay_of(
    overlay: Overlay | None, like: Tensor, key_XPGE: Tensor
) -> tuple[tuple[Tensor | None, Tensor | None], int]:
    """What lies over the entries that rows read, as kernels take it: the rows' recursions and the entries, None for
    nothing, and the distance from one recursion's to the next. Raises ValueError for what they cannot read."""
    if overlay is None:
        return (None, None), 0
    check_rows(like, recursion_N=overlay.recursion_N)
    pages, entry_RXP = tuple(key_XPGE.shape[:2]), overlay.entry_RXP
    if entry_RXP.shape[1:] != pages or not entry_RXP.is_contiguous():
        raise ValueError(
            f"overlay of shape {tuple(entry_RXP.shape)} and strides {entry_RXP.stride()} must be contiguous and have "
            f"one for each entry of {pages[0]} pages of {pages[1]} entries"
        )
    return (overlay.recursion_N, entry_RXP), entry_RXP.stride(0)


def check_projection(qkv_NC: Tensor, cos_NE: Tensor, sin_NE: Tensor, heads: int, groups: int) -> None:
    """Raises ValueError unless a fused projection and its rotary positions are such as can be rotated."""
    size = cos_NE.shape[1]
    check_head_size(size)
    check_rows(qkv_NC, cos_NE=cos_NE, sin_NE=sin_NE)
    if qkv_NC.shape[1] != (heads + 2 * groups) * size or qkv_NC.stride(1) != 1:
        raise ValueError(
            f"a projection of shape {tuple(qkv_NC.shape)} and strides {qkv_NC.stride()} does not hold {heads} queries "
            f"and {groups} keys and values of size {size} a row"
        )
    if cos_NE.dtype != qkv_NC.dtype or sin_NE.dtype != qkv_NC.dtype:
        raise ValueError(f"cosines of {cos_NE.dtype} and sines of {sin_NE.dtype} must be of {qkv_NC.dtype}")
