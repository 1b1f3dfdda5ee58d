"""The steps of a visit between its layers, each in one kernel: see `mor.engine.slot_steps`, whose results these are.

Legend: N slots of the visit, C slots that may turn in it, D hidden size, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mor.engine import slot_steps as plain
from mor.engine.kernels.launch import runs_kernel
from mor.engine.kernels.slot_kernels import advance_kernel, enter_kernel, settle_kernel, turn_kernel
from mor.engine.slot_routing import Merged
from mor.engine.slot_state import SlotState
from mor.engine.slot_steps import Entering, Geometry, Places, Turning

_LEAST_SLOTS = 128  # that a program counts among: fewer take no less time, and would be compiled for each number


class SlotSteps:
    """`mor.engine.slot_steps.SlotSteps` by kernels."""

    def __new__(cls, state: SlotState, geometry: Geometry) -> Any:
        """On a device without kernels, their twin."""
        return super().__new__(cls) if runs_kernel(state.ints) else plain.SlotSteps(state, geometry)

    def __init__(self, state: SlotState, geometry: Geometry) -> None:
        self._state, self._geometry = state, geometry
        (_, hidden), size = state.stream.shape, geometry.cos_LE.shape[1]
        num_ints, num_floats = state.ints.shape[1], state.floats.shape[1]
        self._columns = dict(NUM_INTS=num_ints, NUM_FLOATS=num_floats, BLOCK_I=triton.next_power_of_2(num_ints))
        self._hidden = dict(HIDDEN=hidden, BLOCK_D=triton.next_power_of_2(hidden))
        self._rotary = dict(
            WIDTH=state.tables.shape[2],
            SIZE=size,
            BLOCK_E=triton.next_power_of_2(size),
        )
        self._outer = dict(RECURSIONS=geometry.num_recursions, ENTRIES=geometry.outer_entries, **self._rotary)
        self._known = state.tables, geometry.cos_LE, geometry.sin_LE

    def turn(self, slots: int, turns: int) -> Turning:
        state = self._state
        num_ints, num_floats = state.ints.shape[1], state.floats.shape[1]
        places = self._new_places(turns)
        turning = Turning(
            slot_C=self._integers(turns),
            place_N=self._integers(slots),
            ints_CI=self._integers(turns, num_ints),
            floats_CF=torch.empty(turns, num_floats, dtype=torch.float64, device=state.device),
            x_CD=state.stream.new_empty(turns, state.stream.shape[1]),
            places=self._seen(places),
        )
        turn_kernel[(slots,)](
            *(state.ints, state.floats, state.stream, *self._known),
            *(turning.slot_C, turning.place_N, turning.ints_CI, turning.floats_CF, turning.x_CD, *places),
            *(slots, turns, state.num_slots, self._geometry.nobodys, state.ints.stride(1)),
            ALL=turns == slots,
            BLOCK_F=triton.next_power_of_2(num_floats),
            BLOCK_N=1 if turns == slots else max(_LEAST_SLOTS, triton.next_power_of_2(slots)),
            **self._columns,
            **self._hidden,
            **self._outer,
        )
        return turning

    def advance(
        self, turning: Turning, token_C: Tensor, logprob_C: Tensor, embedding_VD: Tensor
    ) -> tuple[Tensor, Places]:
        state, places = self._state, self._new_places(len(token_C))
        x_CD = torch.empty_like(turning.x_CD)
        advance_kernel[(len(token_C),)](
            *(turning.ints_CI, turning.slot_C, token_C, logprob_C, embedding_VD),
            *(state.reports, state.visit, state.lengths, *self._known, x_CD, *places),
            *(state.num_slots, self._geometry.nobodys),
            NUM_INTS=self._columns["NUM_INTS"],
            **self._hidden,
            **self._outer,
        )
        return x_CD, self._seen(places)

    def enter(self, slots: int, entering: Entering | None) -> tuple[Tensor, list[Places]]:
        state, geometry = self._state, self._geometry
        y_ND = state.stream.new_empty(slots, state.stream.shape[1])
        places = self._new_places(geometry.taken, slots)
        overlay_RXP = geometry.overlay_RXP
        recursion = () if overlay_RXP is None else (self._integers(geometry.taken, slots),)
        enter_kernel[(slots,)](
            *_entering(entering),
            *(state.ints, state.floats, state.stream, state.x, state.lengths, *self._known, y_ND, *places),
            *(*(recursion or (None,)), overlay_RXP),
            *(geometry.nobodys, state.ints.stride(1), 0 if overlay_RXP is None else overlay_RXP.stride(0)),
            READS_FIRST=geometry.reads_first,
            WRITES_OWN=geometry.writes_own,
            OVERLAYING=0 if overlay_RXP is None else len(overlay_RXP),
            TAKEN=geometry.taken,
            SEQUENCES=state.tables.shape[1],
            ENTRIES=geometry.block_entries,
            **self._columns,
            **self._hidden,
            **self._rotary,
        )
        return y_ND, [tuple(part[each] for part in (*places, *recursion)) for each in range(geometry.taken)]

    def settle(self, slots: int, merged: Merged) -> None:
        state = self._state
        settle_kernel[(slots,)](
            *(merged.stream_ND, merged.x_ND, merged.taken_N, merged.gate_N),
            *(state.ints, state.floats, state.stream, state.x, state.visit),
            *(merged.stream_ND.stride(0), merged.x_ND.stride(0), state.ints.stride(1)),
            TAKEN=self._geometry.taken,
            NUM_FLOATS=self._columns["NUM_FLOATS"],
            **self._hidden,
        )

    def _seen(self, places: Places) -> Places:
        """Places of the unshared layers, if there are any."""
        return places if self._geometry.outer_entries else ()

    def _integers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self._state.device)

    def _new_places(self, *shape: int) -> Places:
        """To be written."""
        cos_LE = self._geometry.cos_LE
        rotary = [cos_LE.new_empty(*shape, cos_LE.shape[1]) for _ in range(2)]
        return *rotary, *(self._integers(*shape) for _ in range(4))


def _entering(entering: Entering | None) -> tuple[Tensor | None, ...]:
    if entering is None:
        return (None,) * 6
    turning, begun = entering.turning, entering.begun
    return turning.place_N, turning.ints_CI, entering.x_CD, begun.taken_N, begun.gate_N, begun.target_N
