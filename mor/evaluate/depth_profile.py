"""Who goes deep: depths by kind of token and by place in the row.

Legend: B rows, T tokens, V vocabulary, R recursions, P places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.model.modeling_mor import MorForCausalLM

NUM_PLACES = 64


@dataclass(frozen=True, kw_only=True)
class DepthProfile:
    """`by_kind`: for each kind of token that occurs, the number of tokens of depth 0, 1, ..., R. `by_place`: the share
    of tokens that take recursion 1, ..., R, for each of up to `NUM_PLACES` equal stretches of the row; `dead`: for each
    recursion, the share of places in the row at which no row's token takes it. `place_width`: places per stretch."""

    by_kind: dict[str, tuple[int, ...]]
    by_place: tuple[tuple[float, ...], ...]
    dead: tuple[float, ...]
    place_width: int

    def mean_depth(self, kind: str) -> float:
        """Block applications per token of a kind."""
        counts = self.by_kind[kind]
        return sum(depth * count for depth, count in enumerate(counts)) / sum(counts)


@torch.no_grad()
def depth_profile(
    model: MorForCausalLM,
    batches: Iterable[Tensor],
    kinds: Tensor,
    names: tuple[str, ...],
    *,
    mean_depth: float | None = None,
) -> DepthProfile:
    """Depths under causal decisions on rows (B, T) of one length; `kinds` (V,) gives indices into `names`.

    Raises ValueError when there are no rows.
    """
    levels = model.config.num_recursions + 1
    by_kind = torch.zeros(len(names), levels, dtype=torch.int64)
    taken, rows = None, 0
    for rows_BT in batches:
        depths_BT = model(
            rows_BT.to(model.device), use_cache=False, mean_depth=mean_depth, logits_to_keep=1
        ).depths.cpu()
        cell = kinds[rows_BT] * levels + depths_BT
        by_kind += torch.bincount(cell.flatten(), minlength=by_kind.numel()).view_as(by_kind)
        took_TR = torch.stack([(depths_BT > r).sum(0) for r in range(levels - 1)], dim=1)
        taken, rows = took_TR if taken is None else taken + took_TR, rows + len(rows_BT)
    if taken is None:
        raise ValueError("a depth profile needs rows of tokens")
    width = -(-len(taken) // NUM_PLACES)
    stretches = [part.double().sum(0) / (len(part) * rows) for part in taken.split(width)]
    return DepthProfile(
        by_kind={name: tuple(row) for name, row in zip(names, by_kind.tolist(), strict=True) if sum(row)},
        by_place=tuple(tuple(share.tolist()) for share in stretches),
        dead=tuple((taken == 0).double().mean(0).tolist()),
        place_width=width,
    )
