"""One visit of all slots, as a program of fixed shape: nothing in it depends on a number that only the device knows.

Slots that rest have been through their recursions, or are new. Up to `turns` of them turn in a visit: last layers, head
and the next token, then the embedding, the first layers and the router's first decision. After that the block is
applied once to every slot, whatever its recursion. A row that takes no part in a step runs along with it: it writes to
a page that belongs to nobody, and sees nothing.

Legend: N slots of the visit, C slots that may turn in it, D hidden size, Q virtual sequences, P entries of a page.
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

from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.layers import Layers, Pages
from mor.engine.native.few_rows import Seen
from mor.engine.slot_routing import SlotRouting
from mor.engine.slot_state import BROKEN, NOTHING, RESTING, Float, Int, SlotState
from mor.model.modeling_mor import MorForCausalLM


@dataclass(frozen=True, kw_only=True)
class VisitShape:
    """`slots`: the first of them take part. `turns`: how many may turn. `longest`: a bound on entries that one sees."""

    slots: int
    turns: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """Rows of slots: the table that each reads, and the last entry that it sees, -1 for none. See `layers.Rows`."""

    rotary: tuple[Tensor, Tensor]
    page_N: Tensor
    place_N: Tensor
    table_TX: Tensor
    table_N: Tensor
    last_N: Tensor
    longest: int
    ops: ModuleType

    @property
    def seen(self) -> Seen:
        return Seen(table_TX=self.table_TX, row_N=self.table_N, last_N=self.last_N, longest=self.longest)

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        return self.ops.attend_pages(  # type: ignore[no-any-return]
            query_NHE, *pages, self.table_TX, self.table_N, self.last_N, self.longest
        )

    def attend_new(self, qkv_NC: Tensor, heads: int, pages: Pages) -> Tensor:
        """A row that writes sees its new entry last."""
        new = qkv_NC, *self.rotary, self.page_N, self.place_N
        seen = self.table_TX, self.table_N, self.last_N, self.longest
        return self.ops.attend_new(*new, *pages, *seen, heads)  # type: ignore[no-any-return]


class SlotProgram:
    """Runs visits on the state of the slots.

    What stands between the layers is many small steps on small tensors. On CUDA each of the four runs of them is
    compiled into a few kernels, whatever the number of slots.

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
        self.state, self._layout, self._store, self._routing, self._ops = state, layout, store, routing, layers.ops
        self._model, self._head, self._layers = model.model, model.lm_head, layers
        self._plan, self._policy = model.config.depth_plan, model.config.kv_cache
        numbers = torch.arange(max_length, device=state.device)
        cos_1LE, sin_1LE = self._model.rotary_emb(state.x[None], position_ids=numbers[None])
        self._numbers = torch.arange(state.num_slots, device=state.device)
        self._cos_LE, self._sin_LE = cos_1LE[0].contiguous(), sin_1LE[0].contiguous()
        self._table = state.tables.flatten(0, 1)
        wrap = _compiled if state.device.type == "cuda" else _as_it_is
        self._turn, self._advance = wrap(self._turn), wrap(self._advance)
        self._enter, self._merge = wrap(self._enter), wrap(self._merge)

    @torch.inference_mode()
    def visit(self, shape: VisitShape) -> bool:
        """One visit of the slots. True if it is known that a request ended in it."""
        number_N = self._numbers[: shape.slots]
        slot_C, samples_C, turns_C, x_CD, places = self._turn(number_N, self._numbers[: shape.turns])
        x_CD = self._outer_layers(self._model.last_layers, x_CD, places, shape, first=self._plan.num_outer)
        token_C, logprob_C = self._draw(slot_C, x_CD)
        ints, x_CD, places = self._advance(slot_C, samples_C, turns_C, token_C, logprob_C)
        x_CD = self._outer_layers(self._model.first_layers, x_CD, places, shape, first=0)
        each = self._enter(number_N, slot_C, ints, x_CD)
        y_ND = self._block(self.state.x[: shape.slots].clone(), each, shape)
        self._merge(number_N, y_ND)
        return False

    def _outer_layers(
        self, layers: nn.ModuleList, x_CD: Tensor, places: _Places, shape: VisitShape, *, first: int
    ) -> Tensor:
        pages = self._store.outer_layers[first : first + len(layers)]
        return self._layers(layers, x_CD, [self._rows(places, shape)] * len(layers), pages) if layers else x_CD

    def _block(self, x_ND: Tensor, each: Sequence[_Places], shape: VisitShape) -> Tensor:
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

    def _draw(self, slot_C: Tensor, x_CD: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (C,) and their log-probabilities."""
        ints, floats = self.state.ints[slot_C], self.state.floats[slot_C]
        return self._layers.draw_tokens(
            self._layers.logits(self._model.norm, self._head, x_CD),
            floats[:, Float.TEMPERATURE],
            ints[:, Int.TOP_K],
            floats[:, Float.TOP_P],
            floats[:, Float.MIN_P],
            ints[:, Int.SEED],
            ints[:, Int.MADE],
        )

    def _rows(self, places: _Places, shape: VisitShape) -> PlacedRows:
        cos_NE, sin_NE, page_N, place_N, table_N, last_N = places
        return PlacedRows(
            rotary=(cos_NE, sin_NE),
            page_N=page_N,
            place_N=place_N,
            table_TX=self._table,
            table_N=table_N,
            last_N=last_N,
            longest=shape.longest,
            ops=self._ops,
        )

    def _turn(self, number_N: Tensor, place_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, _Places]:
        """The slots that turn now, of those numbered `number_N`, in as many places: their numbers (nobody's where there
        are fewer), which have a token to sample and which are a slot's at all, their streams, and where the last layers
        find theirs."""
        nobody, ints = self.state.num_slots, self.state.ints[: len(number_N)]
        rests_N = (ints[:, Int.LIVE] > 0) & (ints[:, Int.RECURSION] == RESTING)
        if len(place_C) == len(number_N):
            slot_C, turns_C = torch.where(rests_N, number_N, nobody), rests_N
        else:
            turns = len(place_C)
            place_N = torch.where(rests_N, rests_N.cumsum(0) - 1, turns).clamp(max=turns)
            slot_C = torch.cat((torch.full_like(place_C, nobody), place_C[:1]))  # one place more, for the others
            slot_C = slot_C.scatter(0, place_N, number_N)[:turns]
            turns_C = slot_C != nobody
        ints = self.state.ints[slot_C]
        samples_C = turns_C & (ints[:, Int.FRESH] == 0)
        return slot_C, samples_C, turns_C, self.state.stream[slot_C], self._outer_places(slot_C, samples_C, ints)

    def _advance(
        self, slot_C: Tensor, samples_C: Tensor, turns_C: Tensor, token_C: Tensor, logprob_C: Tensor
    ) -> tuple[Tensor, Tensor, _Places]:
        """Report the tokens. Returns the rows with which slots enter, those that ended no longer live, their
        embeddings, and where the first layers find theirs."""
        ints = self.state.ints[slot_C]
        self._report(slot_C, samples_C, ints, token_C, logprob_C)
        is_stop_C = (ints[:, Int.STOPS :] == token_C[:, None]).any(1) | (token_C < 0)
        left_C = ints[:, Int.LEFT] - samples_C.long()
        ended_C = samples_C & (is_stop_C | (left_C <= 0))
        ints = _changed(
            ints,
            {
                Int.TOKEN: torch.where(samples_C, token_C, ints[:, Int.TOKEN]).clamp(min=0),
                Int.NUMBER: ints[:, Int.NUMBER] + samples_C,
                Int.LIVE: (turns_C & ~ended_C).long(),
                Int.FRESH: torch.zeros_like(left_C),
                Int.MADE: ints[:, Int.MADE] + samples_C,
                Int.LEFT: left_C,
                Int.DEPTH: torch.zeros_like(left_C),
            },
        )
        x_CD = self._model.embed_tokens(ints[:, Int.TOKEN])
        return ints, x_CD, self._outer_places(slot_C, ints[:, Int.LIVE] > 0, ints)

    def _report(self, slot_C: Tensor, samples_C: Tensor, ints: Tensor, token_C: Tensor, logprob_C: Tensor) -> None:
        """Write what was sampled where the host will find it."""
        token_C = torch.where(token_C < 0, BROKEN, token_C)
        said_3C = torch.stack(
            [
                torch.where(samples_C, token_C, NOTHING).int(),
                ints[:, Int.DEPTH].int(),
                logprob_C.float().view(torch.int32),
            ]
        )
        report_3S = torch.full_like(self.state.reports[0], NOTHING).index_copy(1, slot_C, said_3C)
        self.state.reports.index_copy_(0, self.state.visit, report_3S[None])
        self.state.visit += 1

    def _enter(self, number_N: Tensor, slot_C: Tensor, ints: Tensor, x_CD: Tensor) -> list[_Places]:
        """The first decision of the slots that enter. Returns where the block finds keys and values."""
        state, live_C, floats = self.state, ints[:, Int.LIVE] > 0, self.state.floats[slot_C]
        if self._plan.num_outer:
            length_C = torch.where(live_C, ints[:, Int.NUMBER] + 1, state.lengths[slot_C, -1])
            state.lengths[:, -1].index_copy_(0, slot_C, length_C)
        begun = self._routing.begin(x_CD, ints, floats)
        runs_C = begun.taken_N if self._policy == "recursion" else torch.ones_like(begun.taken_N)
        ints = _changed(
            ints,
            {
                Int.RECURSION: torch.where(runs_C & live_C, 0, RESTING),
                Int.ACTIVE: begun.taken_N.long(),
                Int.TARGET: begun.target_N,
            },
        )
        state.ints.index_copy_(0, slot_C, ints)
        state.floats[:, Float.GATE].index_copy_(0, slot_C, begun.gate_N.double())
        state.stream.index_copy_(0, slot_C, x_CD)
        state.x.index_copy_(0, slot_C, x_CD)
        ints, runs_N = state.ints[: len(number_N)], self._runs(number_N)
        if self._plan.is_sequence:
            each = [torch.full_like(ints[:, 0], recursion) for recursion in range(self._plan.num_recursions)]
        else:
            each = [ints[:, Int.RECURSION].clamp(min=0)]
        return [self._block_places(number_N, recursion_N, runs_N, ints) for recursion_N in each]

    def _merge(self, number_N: Tensor, y_ND: Tensor) -> None:
        """Take the block's output, and decide who goes on."""
        state, slots = self.state, slice(0, len(number_N))
        ints, floats, runs_N = state.ints[slots], state.floats[slots], self._runs(number_N)
        stream_ND, x_ND = state.stream[slots], state.x[slots]
        merged = self._routing.merge(stream_ND, x_ND, y_ND, ints, floats)
        taken = self._plan.num_recursions if self._plan.is_sequence else 1
        goes_on_N = merged.taken_N & runs_N
        changed = _changed(
            ints,
            {
                Int.DEPTH: ints[:, Int.DEPTH] + taken * (ints[:, Int.ACTIVE] * runs_N),
                Int.RECURSION: torch.where(goes_on_N, ints[:, Int.RECURSION] + taken, RESTING),
                Int.ACTIVE: goes_on_N.long(),
            },
        )
        state.ints[slots] = changed
        state.floats[slots, Float.GATE] = merged.gate_N
        state.stream[slots] = torch.where(runs_N[:, None], merged.stream_ND, stream_ND)
        state.x[slots] = torch.where(runs_N[:, None], merged.x_ND, x_ND)

    def _runs(self, number_N: Tensor) -> Tensor:
        """Which slots take part in the block."""
        ints = self.state.ints[: len(number_N)]
        return (ints[:, Int.RECURSION] >= 0) & (ints[:, Int.LIVE] > 0)

    def _outer_places(self, slot_C: Tensor, part_C: Tensor, ints: Tensor) -> _Places:
        """Places of the unshared layers, which have an entry of every token, at its number."""
        number_C = ints[:, Int.NUMBER]
        if not self._plan.num_outer:
            return ()
        sequence_C = torch.full_like(slot_C, self._plan.num_recursions)
        page_C = self._page(slot_C, sequence_C, number_C, part_C, self._layout.outer_entries)
        return self._places(slot_C, sequence_C, number_C, page_C, torch.where(part_C, number_C, -1))

    def _block_places(self, slot_N: Tensor, recursion_N: Tensor, runs_N: Tensor, ints: Tensor) -> _Places:
        """Places of the block, whose sequences grow. A shared cache has entries of the first recursion alone."""
        lengths, number_N = self.state.lengths[: len(ints)], ints[:, Int.NUMBER]
        entry_N = lengths.gather(1, recursion_N[:, None])[:, 0]
        writes_N, read_N, last_N = runs_N, recursion_N, entry_N
        if self._policy == "shared":
            writes_N, read_N, last_N = runs_N & (recursion_N == 0), torch.zeros_like(recursion_N), number_N
        page_N = self._page(slot_N, recursion_N, entry_N, writes_N, self._layout.page_entries)
        grown = lengths.scatter_add(1, recursion_N[:, None], writes_N[:, None].long())
        self.state.lengths[: len(ints)] = grown
        return self._places(slot_N, read_N, number_N, page_N, torch.where(runs_N, last_N, -1))

    def _page(
        self, slot_N: Tensor, sequence_N: Tensor, entry_N: Tensor, writes_N: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Page and place in it of new entries, in pages of `size`."""
        width = self.state.tables.shape[2]
        page_N = self.state.tables[slot_N, sequence_N, (entry_N // size).clamp(max=width - 1)].long()
        return torch.where(writes_N, page_N, self._store.nobodys), entry_N % size

    def _places(
        self, slot_N: Tensor, read_N: Tensor, number_N: Tensor, page_N: tuple[Tensor, Tensor], last_N: Tensor
    ) -> _Places:
        table_N = slot_N * self.state.tables.shape[1] + read_N
        return self._cos_LE[number_N], self._sin_LE[number_N], *page_N, table_N, last_N


COMPILATIONS = 64
"""Of a step in one process: each engine takes a few, for a single slot and for more, all of which may turn or not."""

_Places = tuple[Tensor, ...]
"""Cosines, sines, page, place, table and last entry of rows; see `PlacedRows`. Empty without layers."""

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


def _changed(ints: Tensor, columns: dict[Int, Tensor]) -> Tensor:
    """Rows with some of their columns replaced."""
    return torch.stack([columns[Int(c)] if c in columns else ints[:, c] for c in range(ints.shape[1])], 1)
