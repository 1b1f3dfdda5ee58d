"""What the layers of slots are made of, in plain PyTorch: for CPUs, and what the kernels are held against.

Legend: N rows, D hidden size, K input features, M output features, C projected size, F feed-forward size, T tables, X
pages of a table, P entries of a page, H query heads, G key/value heads, E head size, L entries read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.kv_store import Overlay, Reading
from mor.engine.params import SamplingParams
from mor.engine.sampler import SamplingRow, sample
from mor.engine.slot_steps import SlotSteps
from mor.model.attention import rotate

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

attend_spans = None  # rows of prompts are gathered: see `paged_attention`
FEW_ROWS = 0
"""With so many rows or fewer, a layer is made of `linear_small`: never, as it is no faster here."""


def add_norm(x_ND: Tensor, delta_ND: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x` plus `delta`, added in place, and its RMS norm."""
    if delta_ND is not None:
        x_ND += delta_ND
    return x_ND, F.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def swiglu(both_N2F: Tensor) -> Tensor:
    """silu(first half) * second half."""
    gate_NF, up_NF = both_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def linear_small(
    x_NK: Tensor,
    weight_MK: Tensor,
    *,
    bias_M: Tensor | None = None,
    norm_K: Tensor | None = None,
    eps: float = 1e-5,
    gated: bool = False,
    onto_NM: Tensor | None = None,
) -> Tensor:
    """RMS norm of x if `norm_K` is given, product with the transpose of the weight, SwiGLU if `gated`, and the sum onto
    `onto_NM` if that is given: (N, M), or (N, M/2) if gated."""
    if norm_K is not None:
        x_NK = F.rms_norm(x_NK, norm_K.shape, norm_K, eps)
    out_NM = F.linear(x_NK, weight_MK, bias_M)
    if gated:
        out_NM = swiglu(out_NM)
    return out_NM if onto_NM is None else onto_NM.add_(out_NM)


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
    """Rotated queries (N, H, E); rotated keys and values go to their places in the pages. Without pages, `qkv_NC` holds
    queries alone."""
    if page_N is None or place_N is None or key_XPGE is None or value_XPGE is None:
        return rotate(qkv_NC.unflatten(-1, (heads, -1))[None], cos_NE[None], sin_NE[None])[0]
    groups = key_XPGE.shape[2]
    query_NHE, key_NGE, value_NGE = qkv_NC.unflatten(-1, (-1, cos_NE.shape[-1])).split((heads, groups, groups), 1)
    rotary = cos_NE[None], sin_NE[None]
    key_XPGE[page_N, place_N] = rotate(key_NGE[None], *rotary)[0]
    value_XPGE[page_N, place_N] = value_NGE
    return rotate(query_NHE[None], *rotary)[0]


def attend_pages(
    query_NHE: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    row_N: Tensor,
    last_N: Tensor,
    longest: int,
    overlay: Overlay | None = None,
) -> Tensor:
    """The heads' outputs (N, H, E) of rows that see entries 0..`last_N` of the pages in `table_TX[row_N]`, or what lies
    over them; zeros where `last_N` is -1."""
    reading = Reading.of(table_TX, row_N, -(-longest // key_XPGE.shape[1]), last_N + 1, overlay)
    key_NLGE, value_NLGE = reading(key_XPGE), reading(value_XPGE)
    seen_N11L = (torch.arange(key_NLGE.shape[1], device=last_N.device) <= last_N[:, None])[:, None, None]
    out_NH1E = F.scaled_dot_product_attention(
        query_NHE[:, :, None],
        key_NLGE.transpose(1, 2).nan_to_num(),
        value_NLGE.transpose(1, 2).nan_to_num(),  # old entries of a page are not seen, but are multiplied by 0
        attn_mask=seen_N11L | (last_N < 0)[:, None, None, None],
        enable_gqa=query_NHE.shape[1] != key_NLGE.shape[2],
    )
    return out_NH1E[:, :, 0].masked_fill((last_N < 0)[:, None, None], 0)


def attend_new(
    qkv_NC: Tensor,
    cos_NE: Tensor,
    sin_NE: Tensor,
    page_N: Tensor,
    place_N: Tensor,
    key_XPGE: Tensor,
    value_XPGE: Tensor,
    table_TX: Tensor,
    row_N: Tensor,
    last_N: Tensor,
    longest: int,
    heads: int,
    overlay: Overlay | None = None,
) -> Tensor:
    """`rotate_and_store`, and `attend_pages` of the queries."""
    query_NHE = rotate_and_store(qkv_NC, cos_NE, sin_NE, page_N, place_N, key_XPGE, value_XPGE, heads)
    return attend_pages(query_NHE, key_XPGE, value_XPGE, table_TX, row_N, last_N, longest, overlay)


def draw_tokens(
    logits_NV: Tensor,
    temperature_N: Tensor,
    top_k_N: Tensor,
    top_p_N: Tensor,
    min_p_N: Tensor,
    seed_N: Tensor,
    index_N: Tensor,
    *,
    limited: bool = True,
) -> tuple[Tensor, Tensor]:
    """The next tokens (N,), -1 where there is none to choose, and the log-probabilities that the model gave them."""
    rows = [
        SamplingRow(
            params=SamplingParams(temperature=t, top_k=k, top_p=top_p, min_p=min_p, logprobs=0), seed=seed, index=index
        )
        for t, k, top_p, min_p, seed, index in zip(
            *(_values(t) for t in (temperature_N, top_k_N, top_p_N, min_p_N, seed_N, index_N)), strict=True
        )
    ]
    drawn = sample(logits_NV.float(), rows)
    logprobs = [float("nan") if row.logprob is None else row.logprob for row in drawn]
    return torch.tensor([row.token for row in drawn]), torch.tensor(logprobs)


def _values(tensor: Tensor) -> Sequence[float]:
    return tensor.tolist()  # type: ignore[no-any-return]
