"""What the layers and the sampling of slots are made of on CUDA, under the names of `mor.engine.plain_ops`."""

from __future__ import annotations

from mor.engine.kernels.append_decode import attend_new
from mor.engine.kernels.draw import draw_tokens
from mor.engine.kernels.few_rows import MAX_ROWS as FEW_ROWS
from mor.engine.kernels.few_rows import linear_small
from mor.engine.kernels.fused import add_norm, rotate_and_store, swiglu
from mor.engine.kernels.paged_decode import attend_pages

__all__ = [
    "FEW_ROWS",
    "add_norm",
    "attend_new",
    "attend_pages",
    "draw_tokens",
    "linear_small",
    "rotate_and_store",
    "swiglu",
]
