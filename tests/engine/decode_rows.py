"""Single rows of sequences that decode, as `mor.engine.layers` takes them, on pages of one tiny model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from mor.engine.layers import Layers, Pages, Rows
from mor.model.attention import AttentionScope
from mor.model.modeling_mor import MorForCausalLM
from tests.tiny import tiny_model

ENTRIES, WIDTH = 2, 5


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """A row of each sequence; `page_N` None if none writes."""

    ops: ModuleType
    rotary: tuple[Tensor, Tensor]
    page_N: Tensor | None
    place_N: Tensor
    table_TX: Tensor
    last_N: Tensor

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        row_N = torch.arange(len(self.last_N), device=self.last_N.device)
        return self.ops.attend_pages(query_NHE, *pages, self.table_TX, row_N, self.last_N, ENTRIES * WIDTH)


class AppendingDecodeRows(DecodeRows):
    """The same, in one step."""

    def attend_new(self, qkv_NC: Tensor, heads: int, pages: Pages) -> Tensor:
        row_N = torch.arange(len(self.last_N), device=self.last_N.device)
        seen = *pages, self.table_TX, row_N, self.last_N, ENTRIES * WIDTH
        return self.ops.attend_new(qkv_NC, *self.rotary, self.page_N, self.place_N, *seen, heads)


def decode_model(dtype: torch.dtype, device: torch.device, **changes: object) -> MorForCausalLM:
    """Layers with heads of 16."""
    settings = dict(num_hidden_layers=2, head_dim=16) | changes
    return tiny_model(**settings).to(device, dtype)


def decode(
    model: MorForCausalLM,
    ops: ModuleType,
    num_rows: int,
    kind: type[DecodeRows],
    *,
    num_tokens: int = 10,
    last_reads: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs of all layers at tokens one after another of `num_rows` sequences: (S, N, D), and the pages.

    With `last_reads`, the last token writes nothing and sees those before it.
    """
    config, parameter = model.config, next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(1)
    x_SND = torch.randn(num_tokens, num_rows, config.hidden_size, generator=generator).to(device, dtype)
    shape = 1 + num_rows * WIDTH, len(model.model.recursion.block), 2, ENTRIES, config.num_key_value_heads, 16
    pool = torch.full(shape, float("nan"), device=device, dtype=dtype)
    table_TX = 1 + torch.randperm(num_rows * WIDTH, generator=generator).view(num_rows, WIDTH).to(device)
    block = list(model.model.recursion.block)
    pages = [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(len(block))]
    layers, outs = Layers(config, ops), []
    for step, x_ND in enumerate(x_SND):
        number_N = torch.full((num_rows,), step, device=device)
        cos_1NE, sin_1NE = model.model.rotary_emb(x_ND[None], position_ids=number_N[None])
        rows = kind(
            ops=ops,
            rotary=(cos_1NE[0].contiguous(), sin_1NE[0].contiguous()),
            page_N=table_TX[:, step // ENTRIES].contiguous(),
            place_N=number_N % ENTRIES,
            table_TX=table_TX,
            last_N=number_N,
        )
        if last_reads and step == len(x_SND) - 1:
            rows = replace(rows, page_N=None, last_N=number_N - 1)
        each: list[Rows] = [rows] * len(block)
        outs.append(layers(block, x_ND.clone(), each, pages))
    return torch.stack(outs), pool


class _OwnKeys:
    """The keys and values of the tokens themselves."""

    projects = True

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        assert own is not None
        return own


def as_written(model: MorForCausalLM, num_rows: int) -> Tensor:
    """The same outputs (10, N, D) from the model's own layers, which see all tokens at once."""
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    x_SND = torch.randn(10, num_rows, model.config.hidden_size, generator=generator).to(parameter.device)
    x_NSD = x_SND.transpose(0, 1).to(parameter.dtype)
    position_1S = torch.arange(10, device=parameter.device)[None]
    cos, sin = model.model.rotary_emb(x_NSD, position_ids=position_1S.expand(num_rows, -1))
    for layer in model.model.recursion.block:
        x_NSD = layer(x_NSD, AttentionScope(cos_BKE=cos, sin_BKE=sin, keys_values=_OwnKeys()), 0)
    return x_NSD.transpose(0, 1)
