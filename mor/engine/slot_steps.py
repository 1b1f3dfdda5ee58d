"""What a visit of the slots does between its layers, in plain PyTorch: for CPUs, and what the kernels are held against.

Four steps: slots turn, tokens are reported and the next ones enter, the block's rows find their places, and its output
settles in the slots. What routers compute of their own stands between them, in `mor.engine.slot_routing`.

Legend: S slots, N slots of the visit, C slots that may turn in it, D hidden size, E head size, Q virtual sequences, I
columns of integers, F columns of floats, R recursions, V vocabulary, X pages, P entries of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.kv_store import lay_over
from mor.engine.slot_routing import Begun, Merged
from mor.engine.slot_state import BROKEN, NOTHING, RESTING, Float, Int, SlotState

Places = tuple[Tensor, ...]
"""Of rows: cosines and sines (N, E) of their positions, page and place in it of their new entries, the table that each
reads, and the last entry that it sees, -1 for none; where entries lie over others, also the recursion whose do, 0 for
none. Empty without layers."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What steps know of a model and its pages.

    `cos_LE`, `sin_LE`: rotary positions. `nobodys`: the page where rows write that take no part. `block_entries`,
    `outer_entries`: of a page; the latter 0 without unshared layers. `taken`: recursions that a visit of the block
    counts for. `reads_first`: later recursions read the entries of the first, so every token takes it for its keys and
    values. `writes_own`: they write entries of their own. Where both are so these lie over the others: `overlay_RXP`,
    see `KvStore`, None elsewhere.
    """

    cos_LE: Tensor
    sin_LE: Tensor
    num_recursions: int
    nobodys: int
    block_entries: int
    outer_entries: int
    taken: int
    reads_first: bool
    writes_own: bool
    overlay_RXP: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Turning:
    """Slots that turn, in C places.

    `slot_C`: their numbers, nobody's in places that are left. `place_N`: each slot's place, -1 for none. `ints_CI`,
    `floats_CF`: copies of their rows. `x_CD`: their streams. `places`: where the last layers find theirs.
    """

    slot_C: Tensor
    place_N: Tensor
    ints_CI: Tensor
    floats_CF: Tensor
    x_CD: Tensor
    places: Places


@dataclass(frozen=True, kw_only=True)
class Entering:
    """Those that turned, with the outputs of the first layers (C, D) and the router's first decision."""

    turning: Turning
    x_CD: Tensor
    begun: Begun


class SlotSteps:
    """The steps, on the state of the slots."""

    def __init__(self, state: SlotState, geometry: Geometry) -> None:
        self._state, self._geometry = state, geometry
        self._numbers = torch.arange(state.num_slots, device=state.device)

    def turn(self, slots: int, turns: int) -> Turning:
        """The first `turns` of `slots` slots that rest."""
        nobody, number_N, ints = self._state.num_slots, self._numbers[:slots], self._state.ints[:slots]
        rests_N = (ints[:, Int.LIVE] > 0) & (ints[:, Int.RECURSION] == RESTING)
        if turns == slots:
            slot_C, place_N = torch.where(rests_N, number_N, nobody), torch.where(rests_N, number_N, -1)
        else:
            rank_N = torch.where(rests_N, rests_N.cumsum(0) - 1, turns).clamp(max=turns)
            slot_C = torch.full_like(self._numbers[: turns + 1], nobody)  # one place more, for the others
            slot_C = slot_C.scatter(0, rank_N, number_N)[:turns]
            place_N = torch.where(rank_N < turns, rank_N, -1)
        ints_CI, floats_CF = self._state.ints[slot_C].contiguous(), self._state.floats[slot_C]
        samples_C = (slot_C != nobody) & (ints_CI[:, Int.FRESH] == 0)
        return Turning(
            slot_C=slot_C,
            place_N=place_N,
            ints_CI=ints_CI,
            floats_CF=floats_CF,
            x_CD=self._state.stream[slot_C],
            places=self._outer_places(slot_C, samples_C, ints_CI),
        )

    def advance(
        self, turning: Turning, token_C: Tensor, logprob_C: Tensor, embedding_VD: Tensor
    ) -> tuple[Tensor, Places]:
        """Report the tokens, and let slots that go on take theirs: `turning.ints_CI` changes, and slots that ended are
        no longer live in it. Returns the tokens' embeddings (C, D), and where the first layers find keys and values."""
        slot_C, ints_CI = turning.slot_C, turning.ints_CI
        turns_C = slot_C != self._state.num_slots
        samples_C = turns_C & (ints_CI[:, Int.FRESH] == 0)
        self._report(slot_C, samples_C, ints_CI, token_C, logprob_C)
        is_stop_C = (ints_CI[:, Int.STOPS :] == token_C[:, None]).any(1) | (token_C < 0)
        left_C = ints_CI[:, Int.LEFT] - samples_C.long()
        live_C = turns_C & ~(samples_C & (is_stop_C | (left_C <= 0)))
        ints_CI[:, Int.TOKEN] = torch.where(samples_C, token_C, ints_CI[:, Int.TOKEN]).clamp(min=0)
        ints_CI[:, Int.NUMBER] += samples_C
        ints_CI[:, Int.LIVE] = live_C.long()
        ints_CI[:, Int.FRESH] = 0
        ints_CI[:, Int.MADE] += samples_C
        ints_CI[:, Int.LEFT] = left_C
        ints_CI[:, Int.DEPTH] = 0
        if self._geometry.outer_entries:
            length_C = torch.where(live_C, ints_CI[:, Int.NUMBER] + 1, self._state.lengths[slot_C, -1])
            self._state.lengths[:, -1].index_copy_(0, slot_C, length_C)
        return F.embedding(ints_CI[:, Int.TOKEN], embedding_VD), self._outer_places(slot_C, live_C, ints_CI)

    def _report(self, slot_C: Tensor, samples_C: Tensor, ints_CI: Tensor, token_C: Tensor, logprob_C: Tensor) -> None:
        """Write what was sampled where the host will find it."""
        said_3C = torch.stack(
            [
                torch.where(samples_C, torch.where(token_C < 0, BROKEN, token_C), NOTHING).int(),
                ints_CI[:, Int.DEPTH].int(),
                logprob_C.float().view(torch.int32),
            ]
        )
        report_3S = torch.full_like(self._state.reports[0], NOTHING).index_copy(1, slot_C, said_3C)
        self._state.reports.index_copy_(0, self._state.visit, report_3S[None])

    def enter(self, slots: int, entering: Entering | None) -> tuple[Tensor, list[Places]]:
        """Put those that turned, if any may, back into their slots. Returns the block's input (N, D), and where each
        recursion of the visit finds keys and values."""
        state, geometry = self._state, self._geometry
        if entering is not None:
            self._return(entering)
        recursion_N = state.ints[:slots, Int.RECURSION].clamp(min=0)
        each = [torch.full_like(recursion_N, r) for r in range(geometry.taken)] if geometry.taken > 1 else [recursion_N]
        return state.x[:slots].clone(), [self._block_places(slots, recursion_N) for recursion_N in each]

    def _return(self, entering: Entering) -> None:
        state, begun = self._state, entering.begun
        slot_C, ints_CI = entering.turning.slot_C, entering.turning.ints_CI
        runs_C = torch.ones_like(begun.taken_N) if self._geometry.reads_first else begun.taken_N
        ints_CI[:, Int.RECURSION] = torch.where(runs_C & (ints_CI[:, Int.LIVE] > 0), 0, RESTING)
        ints_CI[:, Int.ACTIVE] = begun.taken_N.long()
        ints_CI[:, Int.TARGET] = begun.target_N
        state.ints.index_copy_(0, slot_C, ints_CI)
        state.floats[:, Float.GATE].index_copy_(0, slot_C, begun.gate_N.double())
        state.stream.index_copy_(0, slot_C, entering.x_CD)
        state.x.index_copy_(0, slot_C, entering.x_CD)

    def settle(self, slots: int, merged: Merged) -> None:
        """Keep the block's output, and who goes on. The visit is over."""
        state, ints, taken = self._state, self._state.ints[:slots], self._geometry.taken
        runs_N = self._runs(slots)
        goes_on_N = merged.taken_N & runs_N
        state.floats[:slots, Float.GATE] = merged.gate_N.double()
        state.stream[:slots] = torch.where(runs_N[:, None], merged.stream_ND, state.stream[:slots])
        state.x[:slots] = torch.where(runs_N[:, None], merged.x_ND, state.x[:slots])
        ints[:, Int.DEPTH] += taken * (ints[:, Int.ACTIVE] * runs_N)
        ints[:, Int.RECURSION] = torch.where(goes_on_N, ints[:, Int.RECURSION] + taken, RESTING)
        ints[:, Int.ACTIVE] = goes_on_N.long()
        state.visit += 1

    def _runs(self, slots: int) -> Tensor:
        """Which slots take part in the block."""
        ints = self._state.ints[:slots]
        return (ints[:, Int.RECURSION] >= 0) & (ints[:, Int.LIVE] > 0)

    def _outer_places(self, slot_C: Tensor, part_C: Tensor, ints_CI: Tensor) -> Places:
        """Places of the unshared layers, which have an entry of every token, at its number."""
        if not self._geometry.outer_entries:
            return ()
        number_C = ints_CI[:, Int.NUMBER]
        sequence_C = torch.full_like(slot_C, self._geometry.num_recursions)
        page_C = self._page(slot_C, sequence_C, number_C, part_C, self._geometry.outer_entries)
        return self._places(slot_C, sequence_C, number_C, page_C, torch.where(part_C, number_C, -1))

    def _block_places(self, slots: int, recursion_N: Tensor) -> Places:
        """Places of the block, whose sequences grow."""
        geometry, size = self._geometry, self._geometry.block_entries
        lengths, number_N = self._state.lengths[:slots], self._state.ints[:slots, Int.NUMBER]
        runs_N, entry_N = self._runs(slots), lengths.gather(1, recursion_N[:, None])[:, 0]
        writes_N = runs_N if geometry.writes_own else runs_N & (recursion_N == 0)
        slot_N, first_N = self._numbers[:slots], torch.zeros_like(recursion_N)
        page_N = self._page(slot_N, recursion_N, entry_N, writes_N, size)
        lengths.scatter_add_(1, recursion_N[:, None], writes_N[:, None].long())
        if not geometry.reads_first:
            return self._places(slot_N, recursion_N, number_N, page_N, torch.where(runs_N, entry_N, -1))
        places = self._places(slot_N, first_N, number_N, page_N, torch.where(runs_N, number_N, -1))
        if geometry.overlay_RXP is None:
            return places
        lay_over(geometry.overlay_RXP, recursion_N, *self._page(slot_N, first_N, number_N, runs_N, size), entry_N)
        return *places, torch.where(runs_N, recursion_N, 0)

    def _page(
        self, slot_N: Tensor, sequence_N: Tensor, entry_N: Tensor, writes_N: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Page and place in it of new entries, in pages of `size`."""
        width = self._state.tables.shape[2]
        page_N = self._state.tables[slot_N, sequence_N, (entry_N // size).clamp(max=width - 1)].long()
        return torch.where(writes_N, page_N, self._geometry.nobodys), entry_N % size

    def _places(
        self, slot_N: Tensor, read_N: Tensor, number_N: Tensor, page_N: tuple[Tensor, Tensor], last_N: Tensor
    ) -> Places:
        table_N = slot_N * self._state.tables.shape[1] + read_N
        return self._geometry.cos_LE[number_N], self._geometry.sin_LE[number_N], *page_N, table_N, last_N
