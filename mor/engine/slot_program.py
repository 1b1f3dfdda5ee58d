"""One visit of all slots, as a program of fixed shape: nothing in it depends on a number that only the device knows.

Slots that rest have been through their recursions, or are new. Up to `turns` of them turn in a visit: last layers, head
and the next token, then the embedding, the first layers and the router's first decision. After that the block is
applied once to every slot, whatever its recursion. A row that takes no part in a step runs along with it: it writes to
a page that belongs to nobody, and sees nothing.

Legend: N slots of the visit, C slots that may turn in it, D hidden size, T rows of the table, X pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.decorators import maybe_mark_dynamic

from mor.engine.kv_store import KvStore, Overlay, PageLayout
from mor.engine.layers import Layers, Pages
from mor.engine.slot_routing import SlotRouting
from mor.engine.slot_state import Float, Int, SlotState
from mor.engine.slot_steps import Entering, Geometry, Places
from mor.model.modeling_mor import MorForCausalLM


@dataclass(frozen=True, kw_only=True)
class VisitShape:
    """`slots`: the first of them take part. `turns`: how many may turn, 0 for a visit of the block alone. `longest`: a
    bound on entries that one sees. `limited`: whether any draws with top-k or top-p."""

    slots: int
    turns: int
    longest: int
    limited: bool = False


@dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """Rows of slots: the table that each reads, the last entry that it sees, -1 for none, and what lies over them. See
    `layers.Rows`."""

    rotary: tuple[Tensor, Tensor]
    page_N: Tensor
    place_N: Tensor
    table_TX: Tensor
    table_N: Tensor
    last_N: Tensor
    longest: int
    overlay: Overlay | None
    ops: ModuleType

    @property
    def seen(self) -> None:
        """The C program has rows of its own: see `slot_rows`."""

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        seen = self.table_TX, self.table_N, self.last_N, self.longest
        return self.ops.attend_pages(query_NHE, *pages, *seen, overlay=self.overlay)  # type: ignore[no-any-return]

    def attend_new(self, qkv_NC: Tensor, heads: int, pages: Pages) -> Tensor:
        """A row that writes sees its new entry last."""
        new = qkv_NC, *self.rotary, self.page_N, self.place_N
        seen = self.table_TX, self.table_N, self.last_N, self.longest
        return self.ops.attend_new(*new, *pages, *seen, heads, overlay=self.overlay)  # type: ignore[no-any-return]


class SlotProgram:
    """Runs visits on the state of the slots.

    What stands between the layers are four steps of the slots and what the router computes. On CUDA each step is a
    kernel, and the router's arithmetic is compiled, whatever the number of slots.

    `runs_ahead`: the host may queue a batch of visits before it has read what the one before did. `rows`: how many took
    the block so far, None where only the device knows.
    """

    runs_ahead = True
    rows: int | None = None

    def __init__(
        self,
        model: MorForCausalLM,
        layout: PageLayout,
        store: KvStore,
        state: SlotState,
        routing: SlotRouting,
        layers: Layers,
        max_length: int,
    ) -> None:
        self.state, self._store, self._ops = state, store, layers.ops
        self._model, self._head, self._layers = model.model, model.lm_head, layers
        self._plan = model.config.depth_plan
        self._table = state.tables.flatten(0, 1)
        self._geometry = geometry_of(model, layout, store, state, max_length)
        self._steps = layers.ops.SlotSteps(state, self._geometry)
        wrap = _compiled if state.device.type == "cuda" else _as_it_is
        self._begin, self._merge = wrap(routing.begin), wrap(routing.merge)

    @torch.inference_mode()
    def visit(self, shape: VisitShape) -> bool:
        """One visit of the slots. True if it is known that a request ended in it."""
        state, slots = self.state, slice(0, shape.slots)
        y_ND, each = self._steps.enter(shape.slots, self._turned(shape) if shape.turns else None)
        y_ND = self._block(y_ND, each, shape)
        merged = self._merge(state.stream[slots], state.x[slots], y_ND, state.ints[slots], state.floats[slots])
        self._steps.settle(shape.slots, merged)
        return False

    def _turned(self, shape: VisitShape) -> Entering:
        """Slots that rest end their tokens and begin the next ones."""
        turning = self._steps.turn(shape.slots, shape.turns)
        x_CD = self._outer_layers(
            self._model.last_layers, turning.x_CD, turning.places, shape, first=self._plan.num_outer
        )
        drawn = self._draw(turning.ints_CI, turning.floats_CF, x_CD, limited=shape.limited)
        x_CD, places = self._steps.advance(turning, *drawn, self._model.embed_tokens.weight)
        x_CD = self._outer_layers(self._model.first_layers, x_CD, places, shape, first=0)
        return Entering(turning=turning, x_CD=x_CD, begun=self._begin(x_CD, turning.ints_CI, turning.floats_CF))

    def _outer_layers(
        self, layers: nn.ModuleList, x_CD: Tensor, places: Places, shape: VisitShape, *, first: int
    ) -> Tensor:
        pages = self._store.outer_layers[first : first + len(layers)]
        return self._layers(layers, x_CD, [self._rows(places, shape)] * len(layers), pages) if layers else x_CD

    def _block(self, x_ND: Tensor, each: Sequence[Places], shape: VisitShape) -> Tensor:
        """The block's output; `each`: the places of every recursion, or the one of rows at recursions of their own."""
        return self._through_block(x_ND, [self._rows(places, shape) for places in each])

    def _through_block(self, x_ND: Tensor, rows: Sequence[PlacedRows]) -> Tensor:
        if self._plan.is_sequence:
            order = [(step.block_layer or 0, rows[step.recursion or 0]) for step in self._plan.block_steps]
        else:
            order = [(layer, rows[0]) for layer in range(self._plan.block_size)]
        return self._layers(
            [self._model.recursion.block[layer] for layer, _ in order],
            x_ND,
            [layer_rows for _, layer_rows in order],
            [self._store.block_layers[layer] for layer, _ in order],
        )

    def _draw(self, ints: Tensor, floats: Tensor, x_CD: Tensor, *, limited: bool) -> tuple[Tensor, Tensor]:
        """The next tokens (C,) and their log-probabilities."""
        return self._layers.draw_tokens(
            self._layers.logits(self._model.norm, self._head, x_CD),
            floats[:, Float.TEMPERATURE],
            ints[:, Int.TOP_K],
            floats[:, Float.TOP_P],
            floats[:, Float.MIN_P],
            ints[:, Int.SEED],
            ints[:, Int.MADE],
            limited=limited,
        )

    def _rows(self, places: Places, shape: VisitShape) -> PlacedRows:
        cos_NE, sin_NE, page_N, place_N, table_N, last_N, *over = places
        return PlacedRows(
            rotary=(cos_NE, sin_NE),
            page_N=page_N,
            place_N=place_N,
            table_TX=self._table,
            table_N=table_N,
            last_N=last_N,
            longest=shape.longest,
            overlay=Overlay(over[0], self._store.overlay_RXP) if over else None,
            ops=self._ops,
        )


def geometry_of(
    model: MorForCausalLM, layout: PageLayout, store: KvStore, state: SlotState, max_length: int
) -> Geometry:
    """What steps know of a model and its pages, with rotary positions of up to `max_length` tokens."""
    plan, policy = model.config.depth_plan, model.config.kv_cache
    numbers = torch.arange(max_length, device=state.device)
    cos_1LE, sin_1LE = model.model.rotary_emb(state.x[None], position_ids=numbers[None])
    return Geometry(
        cos_LE=cos_1LE[0].contiguous(),
        sin_LE=sin_1LE[0].contiguous(),
        num_recursions=plan.num_recursions,
        nobodys=store.nobodys,
        block_entries=layout.page_entries,
        outer_entries=layout.outer_entries,
        taken=plan.num_recursions if plan.is_sequence else 1,
        reads_first=policy != "recursion",
        writes_own=policy != "shared",
        overlay_RXP=store.overlay_RXP if layout.num_overlaying else None,
    )


COMPILATIONS = 64
"""Of a router's arithmetic in one process: each engine takes a few, for a single slot and for more."""

_Step = Callable[..., Any]


def _as_it_is(step: _Step) -> _Step:
    return step


def _compiled(step: _Step) -> _Step:
    """Compiled for all numbers of slots at once, by each of a process's engines."""
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
    run = torch.compile(step, fullgraph=True)

    def with_any_number_of_rows(*rows: Tensor) -> Any:
        for tensor in rows:
            maybe_mark_dynamic(tensor, 0)
        return run(*rows)

    return with_any_number_of_rows
