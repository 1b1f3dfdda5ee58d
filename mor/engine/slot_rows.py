"""The visit of `mor.engine.slot_program` on exactly the rows that matter: for a CPU, which can ask which they are.

The rows of the slots are numbers that the host reads and writes through numpy, whose steps on a few numbers take a
fraction of PyTorch's.

Legend: N rows, C slots that turn, D hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mor.engine.kv_store import Overlay, lay_over
from mor.engine.slot_program import PlacedRows, SlotProgram, VisitShape
from mor.engine.slot_state import BROKEN, RESTING, Float, Int, Report

Integers = npt.NDArray[np.int64]


class RowProgram(SlotProgram):
    """Runs visits on the state of slots that lie in the host's memory. It knows at once who has ended."""

    runs_ahead = False
    rows: int

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows = 0
        state = self.state
        self._ints, self._lengths, self._tables = state.ints.numpy(), state.lengths.numpy(), state.tables.numpy()
        self._floats, self._reports = state.floats.numpy(), state.reports.numpy()

    @torch.inference_mode()
    def visit(self, shape: VisitShape) -> bool:
        """One visit of the slots, of which all may turn or none."""
        ints, visit = self._ints[: shape.slots], int(self.state.visit)
        is_live_N = ints[:, Int.LIVE] > 0
        rests_C = np.flatnonzero(is_live_N & (ints[:, Int.RECURSION] == RESTING))
        if len(rests_C) and shape.turns:
            self._finish(rests_C[ints[rests_C, Int.FRESH] == 0], visit)
            ints[rests_C[:, None], (Int.FRESH, Int.DEPTH)] = 0
            self._start(rests_C[ints[rests_C, Int.LIVE] > 0])
        has_end = bool((is_live_N & (ints[:, Int.LIVE] == 0)).any())
        self._go_round(np.flatnonzero((ints[:, Int.LIVE] > 0) & (ints[:, Int.RECURSION] >= 0)))
        self.state.visit += 1
        return has_end

    def _finish(self, slot_C: Integers, visit: int) -> None:
        """Last layers, head and the next token of slots that have been through their recursions."""
        if not len(slot_C):
            return
        index_C = torch.from_numpy(slot_C)
        x_CD = self.state.stream.index_select(0, index_C)
        x_CD = self._outer(self._model.last_layers, x_CD, slot_C, first=self._plan.num_outer)
        floats = self._floats[slot_C]
        is_limited = (self._ints[slot_C, Int.TOP_K] > 0) | (floats[:, Float.TOP_P] < 1) | (floats[:, Float.MIN_P] > 0)
        drawn = self._draw(*self._numbers_of(slot_C), x_CD, limited=bool(is_limited.any()))
        token_C, logprob_C = drawn[0].numpy(), drawn[1].float().numpy()
        ints, reports = self._ints, self._reports[visit]
        reports[Report.TOKEN, slot_C] = np.where(token_C < 0, BROKEN, token_C)
        reports[Report.DEPTH, slot_C] = ints[slot_C, Int.DEPTH]
        reports[Report.LOGPROB, slot_C] = logprob_C.view(np.int32)
        stops_C = (ints[slot_C, Int.STOPS :] == token_C[:, None]).any(1) | (token_C < 0)
        ints[slot_C, Int.TOKEN] = np.maximum(token_C, 0)
        ints[slot_C, Int.NUMBER] += 1
        ints[slot_C, Int.MADE] += 1
        ints[slot_C, Int.LEFT] -= 1
        ints[slot_C, Int.LIVE] = ~stops_C & (ints[slot_C, Int.LEFT] > 0)

    def _start(self, slot_C: Integers) -> None:
        """Embedding, first layers and the first decision of slots that enter."""
        if not len(slot_C):
            return
        ints, state, index_C = self._ints, self.state, torch.from_numpy(slot_C)
        x_CD = self._model.embed_tokens(torch.from_numpy(ints[slot_C, Int.TOKEN]))
        x_CD = self._outer(self._model.first_layers, x_CD, slot_C, first=0)
        if self._plan.num_outer:
            self._lengths[slot_C, -1] = ints[slot_C, Int.NUMBER] + 1
        begun = self._begin(x_CD, *self._numbers_of(slot_C))
        taken_C = begun.taken_N.numpy()
        ints[slot_C, Int.RECURSION] = 0 if self._geometry.reads_first else np.where(taken_C, 0, RESTING)
        ints[slot_C, Int.ACTIVE], ints[slot_C, Int.TARGET] = taken_C, begun.target_N.numpy()
        self._floats[slot_C, Float.GATE] = begun.gate_N.numpy()
        state.stream.index_copy_(0, index_C, x_CD)
        state.x.index_copy_(0, index_C, x_CD)

    def _go_round(self, slot_N: Integers) -> None:
        """The block on slots at recursions of their own, and who goes on."""
        if not len(slot_N):
            return
        self.rows += len(slot_N)
        ints, state, index_N = self._ints, self.state, torch.from_numpy(slot_N)
        recursion_N = ints[slot_N, Int.RECURSION]
        if self._plan.is_sequence:
            each = [np.full_like(recursion_N, recursion) for recursion in range(self._plan.num_recursions)]
        else:
            each = [recursion_N]
        rows = [self._block_rows(slot_N, recursion_N) for recursion_N in each]
        x_ND, stream_ND = state.x.index_select(0, index_N), state.stream.index_select(0, index_N)
        y_ND = self._through_block(x_ND.clone(), rows)
        merged = self._merge(stream_ND, x_ND, y_ND, *self._numbers_of(slot_N))
        taken = self._geometry.taken
        goes_on_N = merged.taken_N.numpy()
        ints[slot_N, Int.DEPTH] += taken * ints[slot_N, Int.ACTIVE]
        ints[slot_N, Int.RECURSION] = np.where(goes_on_N, recursion_N + taken, RESTING)
        ints[slot_N, Int.ACTIVE] = goes_on_N
        self._floats[slot_N, Float.GATE] = merged.gate_N.numpy()
        state.stream.index_copy_(0, index_N, merged.stream_ND)
        state.x.index_copy_(0, index_N, merged.x_ND)

    def _numbers_of(self, slot_N: Integers) -> tuple[Tensor, Tensor]:
        """Rows of the slots' `ints` and `floats`."""
        return torch.from_numpy(self._ints[slot_N]), torch.from_numpy(self._floats[slot_N])

    def _outer(self, layers: nn.ModuleList, x_CD: Tensor, slot_C: Integers, *, first: int) -> Tensor:
        if not layers:
            return x_CD
        number_C = self._ints[slot_C, Int.NUMBER]
        sequence_C = np.full_like(slot_C, self._plan.num_recursions)
        page_C, place_C = self._page(slot_C, sequence_C, number_C, self._geometry.outer_entries)
        rows = self._seeing(slot_C, sequence_C, number_C, number_C, page_C, place_C)
        return self._layers(layers, x_CD, [rows] * len(layers), self._store.outer_layers[first : first + len(layers)])

    def _block_rows(self, slot_N: Integers, recursion_N: Integers) -> PlacedRows:
        """Rows of the block, whose sequences grow."""
        number_N, entry_N = self._ints[slot_N, Int.NUMBER], self._lengths[slot_N, recursion_N]
        geometry, size = self._geometry, self._geometry.block_entries
        page_N, place_N = self._page(slot_N, recursion_N, entry_N, size)
        if geometry.writes_own:
            self._lengths[slot_N, recursion_N] += 1
        else:
            self._lengths[slot_N, 0] += recursion_N == 0
            page_N = np.where(recursion_N == 0, page_N, geometry.nobodys)
        if not geometry.reads_first:
            return self._seeing(slot_N, recursion_N, entry_N, number_N, page_N, place_N)
        first_N, overlay = np.zeros_like(recursion_N), None
        if geometry.overlay_RXP is not None:
            over = recursion_N, *self._page(slot_N, first_N, number_N, size), entry_N
            lay_over(geometry.overlay_RXP, *map(torch.from_numpy, over))
            overlay = Overlay(recursion_N=torch.from_numpy(recursion_N), entry_RXP=geometry.overlay_RXP)
        return self._seeing(slot_N, first_N, number_N, number_N, page_N, place_N, overlay)

    def _page(self, slot_N: Integers, sequence_N: Integers, entry_N: Integers, size: int) -> tuple[Integers, Integers]:
        """Page and place in it of entries of sequences, in pages of `size`."""
        return self._tables[slot_N, sequence_N, entry_N // size].astype(np.int64), entry_N % size

    def _seeing(
        self,
        slot_N: Integers,
        sequence_N: Integers,
        last_N: Integers,
        number_N: Integers,
        page_N: Integers,
        place_N: Integers,
        overlay: Overlay | None = None,
    ) -> PlacedRows:
        """Rows that see the entries of their sequences up to `last_N`, and write theirs at (`page_N`, `place_N`)."""
        index_N = torch.from_numpy(number_N)
        return PlacedRows(
            rotary=(self._geometry.cos_LE.index_select(0, index_N), self._geometry.sin_LE.index_select(0, index_N)),
            page_N=torch.from_numpy(page_N),
            place_N=torch.from_numpy(place_N),
            table_TX=self._table,
            table_N=torch.from_numpy(slot_N * self._tables.shape[1] + sequence_N),
            last_N=torch.from_numpy(last_N),
            longest=int(last_N.max()) + 1,
            overlay=overlay,
            ops=self._ops,
        )
