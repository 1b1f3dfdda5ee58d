"""The model's layers as the engine runs them: fused projections, and keys and values in pages.

Legend: N rows, D hidden size, C projected size, F feed-forward size, H query heads, G key/value heads, E head size, P
entries of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mor.engine.native.few_rows import MOST_ROWS, FewRows, PreparedRun, Seen
from mor.model.configuration_mor import MorConfig
from mor.model.layers import MorDecoderLayer

Pages = tuple[Tensor, Tensor]
"""A layer's keys and values of all pages, (pages, P, G, E) each."""


class Placement(Protocol):
    """Rows of a visit: their rotary positions (N, E), page and place in it of each one's new entry, and what it sees.

    `page_N` None: none of them writes. A row that does not write among others that do has the page of nobody.
    """

    @property
    def rotary(self) -> tuple[Tensor, Tensor]: ...

    @property
    def page_N(self) -> Tensor | None: ...

    @property
    def place_N(self) -> Tensor: ...

    @property
    def seen(self) -> Seen | None:
        """What they see as tables of pages, None if it is more than that."""
        ...


class Rows(Placement, Protocol):
    """Rows that attend."""

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        """The heads' outputs (N, H, E)."""
        ...


class AppendingRows(Rows, Protocol):
    """Rows that rotate, write their new entries and attend in one step."""

    def attend_new(self, qkv_NC: Tensor, heads: int, pages: Pages) -> Tensor:
        """The heads' outputs (N, H, E), from H queries, G keys and G values of each row as they were projected."""
        ...


_Project = Callable[[Tensor, Tensor | None], Tensor]
"""A projection of a layer's normed input by a weight and a bias."""


@dataclass(frozen=True, kw_only=True)
class _Weights:
    qkv: Tensor
    qkv_bias: Tensor | None
    out: nn.Linear
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: nn.Linear
    input_norm: Tensor
    post_norm: Tensor


class Layers:
    """All unique layers of a model, their projections fused. Weights are held once: the model's own become views."""

    def __init__(self, config: MorConfig, ops: ModuleType, few_rows: FewRows | None = None) -> None:
        """`few_rows`: what runs layers of few rows on a CPU, None for `ops` alone."""
        assert config.head_dim is not None
        self._few_rows = few_rows
        self.ops, self._heads, self._eps = ops, config.num_attention_heads, config.rms_norm_eps
        self._query_size = config.num_attention_heads * config.head_dim
        self._act = None if config.hidden_act in ("silu", "swish") else ACT2FN[config.hidden_act]
        self._weights: dict[int, _Weights] = {}

    def __call__(
        self, layers: nn.ModuleList | list[nn.Module], x_ND: Tensor, rows: Sequence[Rows], pages: Sequence[Pages]
    ) -> Tensor:
        """The output of one layer after another, each with its rows and pages; `x_ND`, contiguous, is overwritten."""
        each = [self._of(cast(MorDecoderLayer, layer)) for layer in layers]
        if self._few_rows is not None and rows and all(r is rows[0] for r in rows):
            seen = rows[0].seen if len(x_ND) <= MOST_ROWS else None
            if seen is not None:
                where = rows[0].rotary, rows[0].page_N, rows[0].place_N
                self._few_rows.layers(each, x_ND, *where, seen, pages)(len(x_ND), seen.longest)
                return x_ND
        steps = zip(each, rows, pages, strict=True)
        if len(x_ND) <= self.ops.FEW_ROWS:
            for weights, layer_rows, layer_pages in steps:
                self._apply_to_few(weights, x_ND, layer_rows, layer_pages)
            return x_ND
        delta_ND: Tensor | None = None
        for weights, layer_rows, layer_pages in steps:
            x_ND, h_ND = self.ops.add_norm(x_ND, delta_ND, weights.input_norm, self._eps)
            out_NC = self._attended(partial(F.linear, h_ND), weights, layer_rows, layer_pages)
            x_ND, h_ND = self.ops.add_norm(x_ND, weights.out(out_NC), weights.post_norm, self._eps)
            delta_ND = weights.down(self._gated(F.linear(h_ND, weights.gate_up, weights.gate_up_bias)))
        return x_ND if delta_ND is None else x_ND + delta_ND

    def prepared(
        self, layers: nn.ModuleList | list[nn.Module], x_ND: Tensor, rows: Placement, pages: Sequence[Pages]
    ) -> PreparedRun:
        """These layers in the C program, on rows whose tensors stay the same and are filled anew for each visit."""
        assert rows.seen is not None
        each = [self._of(cast(MorDecoderLayer, layer)) for layer in layers]
        return self.few_rows.layers(each, x_ND, rows.rotary, rows.page_N, rows.place_N, rows.seen, pages)

    def _apply_to_few(self, weights: _Weights, x_ND: Tensor, rows: Rows, pages: Pages) -> None:
        """A layer in as few steps as there are products and one for attention: `x_ND` becomes its output."""
        linear = self.ops.linear_small

        def project(weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear(x_ND, weight, bias_M=bias, norm_K=weights.input_norm, eps=self._eps)  # type: ignore[no-any-return]

        linear(self._attended(project, weights, rows, pages), weights.out.weight, bias_M=weights.out.bias, onto_NM=x_ND)
        norm = dict(norm_K=weights.post_norm, eps=self._eps)
        both_NF = linear(x_ND, weights.gate_up, bias_M=weights.gate_up_bias, **norm, gated=self._act is None)
        gated_NF = both_NF if self._act is None else self._gated(both_NF)
        linear(gated_NF, weights.down.weight, bias_M=weights.down.bias, onto_NM=x_ND)

    def _attended(self, project: _Project, weights: _Weights, rows: Rows, pages: Pages) -> Tensor:
        """The heads' outputs (N, C), side by side; keys and values go to their pages."""
        weight, bias = weights.qkv, weights.qkv_bias
        if rows.page_N is None:
            query_NC = project(weight[: self._query_size], None if bias is None else bias[: self._query_size])
            query_NHE = self.ops.rotate_and_store(query_NC, *rows.rotary, None, None, None, None, self._heads)
            return rows.attend(query_NHE, pages).flatten(1)
        qkv_NC = project(weight, bias)
        if _append(rows):
            return cast(AppendingRows, rows).attend_new(qkv_NC, self._heads, pages).flatten(1)
        query_NHE = self.ops.rotate_and_store(qkv_NC, *rows.rotary, rows.page_N, rows.place_N, *pages, self._heads)
        return rows.attend(query_NHE, pages).flatten(1)

    def normed(self, norm: nn.RMSNorm, x_ND: Tensor) -> Tensor:
        """The final norm."""
        return self.ops.add_norm(x_ND, None, norm.weight, self._eps)[1]  # type: ignore[no-any-return]

    def logits(self, norm: nn.RMSNorm, head: nn.Linear, x_ND: Tensor) -> Tensor:
        """The head of the final norm (N, V)."""
        if self._few_rows is not None and len(x_ND) <= MOST_ROWS and head.bias is None:
            return self._few_rows.logits(x_ND, norm.weight, head.weight)
        return head(self.normed(norm, x_ND))  # type: ignore[no-any-return]

    def draw_tokens(
        self,
        logits_NV: Tensor,
        temperature_N: Tensor,
        top_k_N: Tensor,
        top_p_N: Tensor,
        min_p_N: Tensor,
        seed_N: Tensor,
        index_N: Tensor,
        *,
        limited: bool,
    ) -> tuple[Tensor, Tensor]:
        """The next tokens (N,), -1 where there is none to choose, and the log-probabilities the model gave them.
        `limited`: whether any row may have top-k or top-p, and with `saves_rows` min-p."""
        if self._few_rows is not None and not limited:
            return self._few_rows.draw(logits_NV, temperature_N, seed_N, index_N)
        return self.ops.draw_tokens(  # type: ignore[no-any-return]
            logits_NV, temperature_N, top_k_N, top_p_N, min_p_N, seed_N, index_N, limited=limited
        )

    @property
    def few_rows(self) -> FewRows:
        """The C program. There must be one: see `saves_rows`."""
        assert self._few_rows is not None
        return self._few_rows

    @property
    def saves_rows(self) -> bool:
        """Whether a row that takes no part in a step costs nothing."""
        return self._few_rows is not None

    def _gated(self, both_N2F: Tensor) -> Tensor:
        if self._act is None:
            return self.ops.swiglu(both_N2F)  # type: ignore[no-any-return]
        gate_NF, up_NF = both_N2F.chunk(2, dim=-1)
        return self._act(gate_NF) * up_NF

    def _of(self, layer: MorDecoderLayer) -> _Weights:
        if id(layer) not in self._weights:
            attention, mlp = layer.self_attn, layer.mlp
            qkv, qkv_bias = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up, gate_up_bias = _fused(mlp.gate_proj, mlp.up_proj)
            self._weights[id(layer)] = _Weights(
                qkv=qkv,
                qkv_bias=qkv_bias,
                out=attention.o_proj,
                gate_up=gate_up,
                gate_up_bias=gate_up_bias,
                down=mlp.down_proj,
                input_norm=layer.input_layernorm.weight,
                post_norm=layer.post_attention_layernorm.weight,
            )
        return self._weights[id(layer)]


def _append(rows: Rows) -> bool:
    """Whether these are `AppendingRows`."""
    return hasattr(rows, "attend_new")


def _fused(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of projections of the same input, one below the other; their own become views of these."""
    biases = [projection.bias for projection in projections if projection.bias is not None]
    return _joined([projection.weight for projection in projections]), _joined(biases) if biases else None


@torch.inference_mode(False)  # the model may be trained on
def _joined(parameters: Sequence[Tensor]) -> Tensor:
    parts = [parameter.data for parameter in parameters]
    if (together := _together(parts)) is not None:
        return together
    joined = torch.cat(parts)
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def _together(parts: Sequence[Tensor]) -> Tensor | None:
    """Parts that lie one behind the other as one tensor: another engine of the model has joined them. Else None."""
    first = parts[0]
    place = first.data_ptr()
    for part in parts:
        of_another = part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        if of_another or part.data_ptr() != place or not part.is_contiguous():
            return None
        place += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
