"""How alike a token's keys and values are from one recursion to the next: what sharing them would throw away.

Legend: T tokens of one row, K of them active, R recursions, X features of all key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.modeling_mor import MorForCausalLM

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class KvSimilarity:
    """(R, R) mean cosine of `keys` and `values` of the same token and layer of the block at two recursions, over the
    tokens active at both; nan where there are none. Rotary positions leave the cosine as it is."""

    keys: Matrix
    values: Matrix


@torch.no_grad()
def kv_similarity(model: MorForCausalLM, rows: Iterable[Tensor]) -> KvSimilarity | None:
    """Of rows (T,), one at a time, under causal decisions; None where later recursions project no keys and values of
    their own, or there is only one recursion."""
    recursions = model.config.num_recursions
    if recursions < 2 or model.config.kv_cache == "shared":
        return None
    sums, counts = torch.zeros(2, recursions, recursions, dtype=torch.float64), torch.zeros(recursions, recursions)
    for row_T in rows:
        with _recorded(model) as projected:
            depths_T = model(row_T[None].to(model.device), use_cache=False, logits_to_keep=1).depths[0]
        for outputs in zip(*projected, strict=True):
            _add(sums, counts, outputs, depths_T, recursions)
    mean = (sums / counts.double()).tolist()
    keys, values = (tuple(tuple(row) for row in matrix) for matrix in mean)
    return KvSimilarity(keys=keys, values=values)


@contextmanager
def _recorded(model: MorForCausalLM) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """The outputs of the key and of the value projections of each layer of the block, in the order of recursions."""
    block: Any = model.model.recursion.block
    found: tuple[list[list[Tensor]], list[list[Tensor]]] = ([[] for _ in block], [[] for _ in block])
    hooks = [
        projection.register_forward_hook(_keep(found[kind][number]))
        for number, layer in enumerate(block)
        for kind, projection in enumerate((layer.self_attn.k_proj, layer.self_attn.v_proj))
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keep(into: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        into.append(output[0].float())

    return hook


def _add(
    sums: Tensor, counts: Tensor, outputs: tuple[list[Tensor], list[Tensor]], depths_T: Tensor, recursions: int
) -> None:
    """Add one layer's cosines. A recursion's rows are its active tokens in order, or all that were alive before it."""
    places = [_places(x_KX, depths_T, r) for r, x_KX in enumerate(outputs[0])]
    for a in range(recursions):
        for b in range(recursions):
            both = depths_T > max(a, b)
            for kind, x in enumerate(outputs):
                first, second = (x[r][torch.isin(places[r], both.nonzero().squeeze(1))] for r in (a, b))
                sums[kind, a, b] += F.cosine_similarity(first, second, dim=-1).double().sum().cpu()
            counts[a, b] += int(both.sum())


def _places(x_KX: Tensor, depths_T: Tensor, recursion: int) -> Tensor:
    """The tokens that the rows of a projection's output belong to."""
    for active_T in (depths_T > recursion, depths_T >= recursion, torch.ones_like(depths_T, dtype=torch.bool)):
        if int(active_T.sum()) == len(x_KX):
            return active_T.nonzero().squeeze(1)
    raise AssertionError(f"{len(x_KX)} keys at recursion {recursion} fit no set of tokens")
