"""What the kernels of linear layers ask of their tensors.

Legend: N rows, K input features, M output features, F those that a gate leaves.
"""

from __future__ import annotations

from torch import Tensor

from mor.engine.kernels.launch import check_rows


def check_linear(
    x_NK: Tensor,
    weight_MK: Tensor,
    bias_M: Tensor | None,
    norm_K: Tensor | None,
    onto_NF: Tensor | None,
    *,
    gated: bool,
    max_rows: int,
) -> None:
    """Raises ValueError for a product that a kernel of at most `max_rows` rows cannot compute."""
    num_rows, width = x_NK.shape
    size = len(weight_MK) // 2 if gated else len(weight_MK)
    if num_rows > max_rows:
        raise ValueError(f"{num_rows} rows are more than the {max_rows} that a product of few rows takes")
    check_rows(x_NK, x_NK=x_NK, **({} if onto_NF is None else {"onto_NM": onto_NF}))
    if weight_MK.shape[1] != width or not weight_MK.is_contiguous() or (gated and len(weight_MK) % 2):
        raise ValueError(
            f"a weight of shape {tuple(weight_MK.shape)} does not take rows of {width}, or is not contiguous"
        )
    if onto_NF is not None and onto_NF.shape[1] != size:
        raise ValueError(f"{size} features cannot be added to rows of shape {tuple(onto_NF.shape)}")
    if bias_M is not None and bias_M.shape != weight_MK.shape[:1]:
        raise ValueError(f"a bias of shape {tuple(bias_M.shape)} does not match {len(weight_MK)} features")
    if norm_K is not None and norm_K.shape != (width,):
        raise ValueError(f"a norm of shape {tuple(norm_K.shape)} does not fit rows of {width}")
