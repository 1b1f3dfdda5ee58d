"""What the layers and the sampling of slots are made of on CUDA, under the names of `mor.engine.plain_ops`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mor.engine.kernels import few_rows
from mor.engine.kernels.append_decode import attend_new
from mor.engine.kernels.draw import draw_tokens
from mor.engine.kernels.fused import add_norm, rotate_and_store, swiglu
from mor.engine.kernels.launch import VERY_FEW_ROWS
from mor.engine.kernels.paged_decode import attend_pages
from mor.engine.kernels.paged_prefill import attend_spans
from mor.engine.kernels.slot_steps import SlotSteps
from mor.engine.kernels.some_rows import linear_some

__all__ = [
    "FEW_ROWS",
    "SlotSteps",
    "add_norm",
    "attend_new",
    "attend_pages",
    "attend_spans",
    "draw_tokens",
    "linear_small",
    "rotate_and_store",
    "swiglu",
]

FEW_ROWS = 16
"""Rows up to which the kernel that reads a weight row by row (`VERY_FEW_ROWS`), and the one on matrix units, are faster
than cuBLAS and the kernels around it, at 360M dimensions on one NVIDIA H200 (`python -m bench.kernels`)."""


def linear_small(x_NK: Tensor, weight_MK: Tensor, **folded: Any) -> Tensor:
    """A linear layer of at most `FEW_ROWS` rows, by the kernel for so many; see `plain_ops.linear_small`."""
    linear = few_rows.linear_small if len(x_NK) <= VERY_FEW_ROWS else linear_some
    return linear(x_NK, weight_MK, **folded)
