"""The visit of `mor.engine.slot_program` on exactly the rows that matter: for a CPU, which can ask which they are.

What stands between the layers runs in the C program, as the layers do: a visit is a dozen calls of it. What it does not
know is done in PyTorch on the same rows: other routers, and draws with top-k or top-p.

Legend: N rows of a step, D hidden size.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.layers import Layers
from mor.engine.native.few_rows import MOST_ROWS, PreparedDraw, PreparedRun
from mor.engine.native.row_steps import RowPlaces, RowSteps
from mor.engine.row_routing import row_router
from mor.engine.slot_program import SlotProgram, VisitShape
from mor.engine.slot_routing import SlotRouting
from mor.engine.slot_state import Int, SlotState
from mor.model.modeling_mor import MorForCausalLM

_OWN = -1
"""Stands for the recursion that each row is at."""


class RowProgram(SlotProgram):
    """Runs visits on the state of slots that lie in the host's memory. It knows at once who has ended."""

    runs_ahead = False
    rows: int

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
        super().__init__(model, layout, store, state, routing, layers, max_length)
        self.rows, self._router = 0, row_router(routing)
        self._at = at = RowSteps(layers.few_rows.library, state, self._geometry, model.model.embed_tokens.weight)
        recursions = range(self._plan.num_recursions) if self._plan.is_sequence else [_OWN]
        self._inside = {recursion: self._places(self._geometry.overlay_RXP) for recursion in recursions}
        self._block_runs = self._runs_of_block()
        self._outside = self._places()
        self._first = self._run_outside(self._model.first_layers, first=0)
        self._last = self._run_outside(self._model.last_layers, first=self._plan.num_outer)
        drawn_by, drawn = (at.temperature_N, at.seed_N, at.made_N), (at.token_N, at.logprob_N)
        weights = self._model.norm.weight, self._head.weight
        self._drawing = PreparedDraw(layers.few_rows, *weights, at.x_ND, drawn_by, drawn)

    def visit(self, shape: VisitShape) -> bool:
        """One visit of the slots, of which all may turn or none."""
        ended = 0
        if shape.turns:
            ended = self._finish(self._at.finishing(shape.slots))
            self._start(self._at.entering(shape.slots))
        self._go_round(self._at.going(shape.slots))
        self._at.settled()
        return ended > 0

    def _finish(self, rows: int) -> int:
        """Last layers, head and the next token of slots that have been through their recursions: how many end."""
        if not rows:
            return 0
        at = self._at
        self._outer(self._last, rows)
        if at.is_limited or rows > MOST_ROWS:
            self._draw_in_pytorch(rows)
        else:
            self._drawing(rows)
        return at.sampled()

    def _start(self, rows: int) -> None:
        """Embedding, first layers and the first decision of slots that enter."""
        if not rows:
            return
        self._outer(self._first, rows)
        if self._router is None:
            self._begin_in_pytorch(rows)
        else:
            self._at.begun(self._router.pointer)
        self._at.entered()

    def _go_round(self, rows: int) -> None:
        """The block on slots at recursions of their own, and who goes on."""
        if not rows:
            return
        self.rows += rows
        longest = {each: self._at.placed_inside(places.pointer, each) for each, places in self._inside.items()}
        for recursion, run in self._block_runs:
            run(rows, longest[recursion])
        if self._router is None:
            self._merge_in_pytorch(rows)
        else:
            self._at.merged(self._router.pointer)

    @torch.inference_mode()
    def _draw_in_pytorch(self, rows: int) -> None:
        at, (_, ints, floats) = self._at, self._slots(rows)
        drawn = self._draw(ints, floats, at.x_ND[:rows], limited=at.is_limited)
        at.token_N[:rows], at.logprob_N[:rows] = drawn

    @torch.inference_mode()
    def _begin_in_pytorch(self, rows: int) -> None:
        at, (slot_N, ints, floats) = self._at, self._slots(rows)
        begun = self._begin(at.x_ND[:rows], ints, floats)
        at.goes_on_N[:rows], at.gate_N[:rows] = begun.taken_N, begun.gate_N
        self.state.ints[slot_N, Int.TARGET] = begun.target_N

    @torch.inference_mode()
    def _merge_in_pytorch(self, rows: int) -> None:
        at, state, (slot_N, ints, floats) = self._at, self.state, self._slots(rows)
        merged = self._merge(state.stream[slot_N], state.x[slot_N], at.x_ND[:rows], ints, floats)
        at.goes_on_N[:rows], at.gate_N[:rows] = merged.taken_N, merged.gate_N
        at.stream_ND[:rows], at.x_ND[:rows] = merged.stream_ND, merged.x_ND

    def _slots(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of a step's rows, and these slots' `ints` and `floats`."""
        slot_N = self._at.slot_N[:rows]
        return slot_N, self.state.ints[slot_N], self.state.floats[slot_N]

    def _outer(self, run: PreparedRun | None, rows: int) -> None:
        if run is not None:
            run(rows, self._at.placed_outside(self._outside.pointer))

    def _places(self, overlay_RXP: Tensor | None = None) -> RowPlaces:
        return RowPlaces(self.state.num_slots, self._geometry, self._table, overlay_RXP)

    def _run_outside(self, layers: nn.ModuleList, *, first: int) -> PreparedRun | None:
        pages = self._store.outer_layers[first : first + len(layers)]
        return self._layers.prepared(layers, self._at.x_ND, self._outside, pages) if layers else None

    def _runs_of_block(self) -> list[tuple[int, PreparedRun]]:
        """The block's layers in their order, in runs of the same recursion."""
        if self._plan.is_sequence:
            order = [(step.recursion or 0, step.block_layer or 0) for step in self._plan.block_steps]
        else:
            order = [(_OWN, layer) for layer in range(self._plan.block_size)]
        runs = []
        for recursion, steps in groupby(order, key=lambda step: step[0]):
            numbers = [layer for _, layer in steps]
            layers = [self._model.recursion.block[layer] for layer in numbers]
            pages = [self._store.block_layers[layer] for layer in numbers]
            run = self._layers.prepared(layers, self._at.x_ND, self._inside[recursion], pages)
            runs.append((recursion, run))
        return runs
