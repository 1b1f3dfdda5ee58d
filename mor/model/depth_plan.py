"""Depth arithmetic: which weight, which recursion and which KV slot each application of a layer uses.

Integers only. Parameters, FLOPs, KV bytes, caches, conversions and the model itself all read this one table
(arXiv 2507.10524, Tables 1 and 5).

Words: a *layer application* is one of the `num_layers` steps a fully recursed token takes; a *unique layer* is a set of
weights; the *block* is the run of unique layers that is shared by all recursions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Sharing = Literal["none", "cycle", "middle_cycle", "sequence", "middle_sequence"]
KvPolicy = Literal["recursion", "shared", "hybrid"]

SHARINGS: tuple[Sharing, ...] = ("none", "cycle", "middle_cycle", "sequence", "middle_sequence")
KV_POLICIES: tuple[KvPolicy, ...] = ("recursion", "shared", "hybrid")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One application of a layer.

    `layer`: its index among all applications, 0..num_layers-1. `weight`: the unique layer whose weights it uses.
    `recursion`: 0-based, or None outside the block. `block_layer`: position inside the block, or None outside.
    """

    layer: int
    weight: int
    recursion: int | None
    block_layer: int | None


@dataclass(frozen=True, kw_only=True)
class KvAccess:
    """How one step meets the KV cache: the slot it reads, whether it projects and writes keys and values of its own,
    and, under `hybrid`, the slot of the first recursion that stands in for tokens this recursion did not visit."""

    slot: int
    writes: bool
    fallback_slot: int | None = None


@dataclass(frozen=True, kw_only=True)
class DepthPlan:
    """The table of `num_layers` layer applications of a model with `num_recursions` recursions of one block.

    Raises ValueError for an unknown sharing, or when the recursions do not divide the shared layers.
    """

    num_layers: int
    num_recursions: int = 1
    sharing: Sharing = "none"

    def __post_init__(self) -> None:
        if self.sharing not in SHARINGS:
            raise ValueError(f"sharing={self.sharing!r} is unknown; choose one of {', '.join(SHARINGS)}")
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1")
        if self.sharing == "none" and self.num_recursions != 1:
            raise ValueError(
                f"num_recursions={self.num_recursions} needs a sharing other than 'none': "
                f"{', '.join(SHARINGS[1:])} ('middle_cycle' is the paper's choice)"
            )
        shared = self.num_layers - 2 * self.num_outer
        if shared < self.num_recursions or shared % self.num_recursions:
            below = shared - shared % self.num_recursions
            near = [n + 2 * self.num_outer for n in (below, below + self.num_recursions) if n > 0]
            raise ValueError(
                f"num_recursions={self.num_recursions} does not divide the {shared} shared layers of "
                f"num_hidden_layers={self.num_layers} with sharing={self.sharing!r}; "
                f"num_hidden_layers={' or '.join(map(str, near))} would fit"
            )

    @property
    def num_outer(self) -> int:
        """Unshared layers at each end: 1 for the `middle_*` sharings, else 0."""
        return int(self.sharing.startswith("middle_"))

    @property
    def block_size(self) -> int:
        """Unique layers in the block."""
        return (self.num_layers - 2 * self.num_outer) // self.num_recursions

    @property
    def num_unique_layers(self) -> int:
        """Sets of layer weights, unshared ones included."""
        return self.block_size + 2 * self.num_outer

    @property
    def is_sequence(self) -> bool:
        """Whether each layer repeats in place (AA BB) instead of the whole block (AB AB)."""
        return self.sharing in ("sequence", "middle_sequence")

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All layer applications, in the order a fully recursed token takes them."""
        return tuple(self._step(layer) for layer in range(self.num_layers))

    @cached_property
    def block_steps(self) -> tuple[Step, ...]:
        """The applications inside the block, in execution order."""
        return tuple(step for step in self.steps if step.recursion is not None)

    def _step(self, layer: int) -> Step:
        if layer < self.num_outer:
            return Step(layer=layer, weight=layer, recursion=None, block_layer=None)
        if layer >= self.num_layers - self.num_outer:
            return Step(layer=layer, weight=self.num_unique_layers - 1, recursion=None, block_layer=None)
        inner = layer - self.num_outer
        if self.is_sequence:
            block_layer, recursion = divmod(inner, self.num_recursions)
        else:
            recursion, block_layer = divmod(inner, self.block_size)
        return Step(layer=layer, weight=self.num_outer + block_layer, recursion=recursion, block_layer=block_layer)

    def kv_access(self, step: Step, policy: KvPolicy) -> KvAccess:
        """Where `step` reads and writes keys and values under a KV policy.

        `recursion`: every application has a slot of its own. `shared`: recursions after the first read the first's slot
        and write nothing. `hybrid`: own slot for the tokens visited, the first recursion's slot for the others.
        """
        if step.recursion is None or step.recursion == 0 or policy == "recursion":
            return KvAccess(slot=step.layer, writes=True)
        first = self.first_applications[step.layer]
        if policy == "shared":
            return KvAccess(slot=first, writes=False)
        return KvAccess(slot=step.layer, writes=True, fallback_slot=first)

    @cached_property
    def first_applications(self) -> tuple[int, ...]:
        """For each layer application, the one in which its layer runs for the first time."""
        return tuple(
            step.layer if step.block_layer is None else self.application(0, step.block_layer) for step in self.steps
        )

    def application(self, recursion: int, block_layer: int) -> int:
        """The layer application of `block_layer` at `recursion` (both 0-based)."""
        stride = (1, self.num_recursions) if self.is_sequence else (self.block_size, 1)
        return self.num_outer + recursion * stride[0] + block_layer * stride[1]


def linear_capacities(num_recursions: int) -> tuple[float, ...]:
    """The paper's default capacities (R - r) / R for r = 0..R-1: 1, ..., 2/R, 1/R."""
    return tuple((num_recursions - r) / num_recursions for r in range(num_recursions))
