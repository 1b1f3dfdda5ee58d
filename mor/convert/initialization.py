"""Which layers of a plain decoder become the shared layers of a recursive one (arXiv 2507.10524, section 4.1).

Integers only: the result is a table of source layers for a conversion to copy or average. The five strategies, the
rounding and the random draws are those of the authors' code, case by case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mor.model.depth_plan import DepthPlan, Sharing

Initialization = Literal["stepwise", "average", "lower", "upper", "random"]

INITIALIZATIONS: tuple[Initialization, ...] = ("stepwise", "average", "lower", "upper", "random")


@dataclass(frozen=True, kw_only=True)
class LayerSources:
    """Where the weights of a recursive model come from.

    `plan`: the depth plan of the result, whose `num_layers` may be lower than the source's. `kept`: the source layers
    that remain after the surplus was dropped, one for each layer application. `sources`: for each unique layer of the
    plan, first to last, the source layers whose mean it starts from (one layer means a copy).
    """

    plan: DepthPlan
    kept: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]


def layer_sources(
    num_layers: int,
    *,
    num_recursions: int,
    sharing: Sharing,
    initialization: Initialization = "stepwise",
    seed: int = 0,
) -> LayerSources:
    """Choose the source layers of every unique layer of a recursive model made from `num_layers` plain ones.

    `stepwise` spreads the block over the whole depth, `lower` and `upper` take the first or the last layers, `random`
    draws them (numpy's legacy generator with `seed`, sorted), `average` takes the mean of all layers that the unique
    layer replaces. Outer layers of the `middle_*` sharings keep their own weights.

    Raises ValueError for an unknown initialization or sharing, or when there are fewer layers than recursions.
    """
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"initialization={initialization!r} is unknown; choose one of {', '.join(INITIALIZATIONS)}")
    kept = kept_layers(num_layers, num_recursions=num_recursions, sharing=sharing)
    plan = DepthPlan(num_layers=len(kept), num_recursions=num_recursions, sharing=sharing)
    outer = plan.num_outer
    if initialization == "average":
        block = _averaged(plan)
    else:
        block = tuple((i,) for i in _chosen(initialization, outer, len(kept) - outer, plan.block_size, seed))
    positions = (*((i,) for i in range(outer)), *block, *((len(kept) - 1 - i,) for i in range(outer)))
    return LayerSources(plan=plan, kept=kept, sources=tuple(tuple(kept[i] for i in group) for group in positions))


def kept_layers(num_layers: int, *, num_recursions: int, sharing: Sharing) -> tuple[int, ...]:
    """The source layers that remain when `num_recursions` does not divide the shared ones: an even spread of them.

    Raises ValueError when not even one shared layer per recursion is there.
    """
    outer = int(sharing.startswith("middle_"))
    inner = num_layers - 2 * outer
    if num_recursions < 1 or inner < num_recursions:
        raise ValueError(
            f"num_recursions={num_recursions} cannot share the {max(inner, 0)} inner layers of a model with "
            f"{num_layers} layers and sharing={sharing!r}; it must be between 1 and their number"
        )
    spread = _even_spread(outer, num_layers - 1 - outer, inner - inner % num_recursions)
    return (*range(outer), *spread, *range(num_layers - outer, num_layers))


def _averaged(plan: DepthPlan) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(step.layer for step in plan.block_steps if step.block_layer == block_layer)
        for block_layer in range(plan.block_size)
    )


def _chosen(initialization: Initialization, start: int, stop: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` of the positions start..stop-1, ascending."""
    if initialization == "stepwise":
        return _even_spread(start, stop - 1, count)
    if initialization == "lower":
        return tuple(range(start, start + count))
    if initialization == "upper":
        return tuple(range(stop - count, stop))
    draw = np.random.RandomState(seed).choice(stop - start, count, replace=False)
    return tuple(sorted(start + int(i) for i in draw))


def _even_spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` integers from `first` to `last`, evenly spaced, halves rounded to even."""
    return tuple(int(i) for i in np.rint(np.linspace(first, last, count)))
