"""The steps of the C program between layers against their twins in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine.native.row_steps import RowPlaces
from mor.engine.slot_routing import Begun, Merged
from mor.engine.slot_state import NOTHING, Float, Int, Report
from mor.engine.slot_steps import Entering, SlotSteps
from tests.engine.native.row_state import SLOTS, Slotted, slotted
from tests.tiny import KV_CACHES, tiny_model


def both(**settings: Any) -> tuple[Slotted, Slotted, SlotSteps]:
    """The same slots twice, for the C program and for its twin."""
    model = tiny_model(**{"router": "expert_choice", **settings})
    mine, other = slotted(model), slotted(model)
    return mine, other, SlotSteps(other.state, other.geometry)


def check_alike(mine: Slotted, other: Slotted) -> None:
    """Of slots that have a request, and what was reported of tokens."""
    live_N = other.state.ints[:SLOTS, Int.LIVE] > 0
    assert torch.equal(mine.state.ints[:SLOTS, Int.LIVE] > 0, live_N)
    assert torch.equal(mine.state.visit, other.state.visit)
    for name in ("ints", "floats", "lengths", "stream", "x"):
        found, expected = (getattr(each.state, name)[:SLOTS][live_N] for each in (mine, other))
        assert torch.equal(found, expected), name
    found_S, expected_S = (each.state.reports[:, :, :SLOTS].transpose(0, 1).flatten(1) for each in (mine, other))
    reported_S = expected_S[Report.TOKEN] != NOTHING
    assert torch.equal(found_S[Report.TOKEN], expected_S[Report.TOKEN])
    assert torch.equal(found_S[:, reported_S], expected_S[:, reported_S])


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("kv_cache", KV_CACHES)
@torch.inference_mode()
def test_slots_turn(kv_cache: str, sharing: str) -> None:
    """Tokens are reported, some of them end their requests, and the next ones enter."""
    mine, other, twin = both(kv_cache=kv_cache, sharing=sharing)
    turning = twin.turn(SLOTS, SLOTS)
    token_C = torch.randint(1, 9, (SLOTS,))
    token_C[torch.rand(SLOTS) < 0.2] = -1
    logprob_C, takes_C, gate_C = torch.randn(SLOTS), torch.rand(SLOTS) < 0.5, torch.rand(SLOTS)
    x_CD, places = twin.advance(turning, token_C, logprob_C, mine.embedding_VD)
    begun = Begun(taken_N=takes_C, gate_N=gate_C, target_N=turning.ints_CI[:, Int.TARGET])
    twin.enter(SLOTS, Entering(turning=turning, x_CD=x_CD, begun=begun))

    at, own = mine.steps, RowPlaces(SLOTS, mine.geometry, mine.state.tables.flatten(0, 1))
    before, rows = mine.state.ints.clone(), at.finishing(SLOTS)
    slot_N = at.slot_N[:rows].clone()
    assert rows > 3 and torch.equal(at.x_ND[:rows], mine.state.stream[slot_N])
    assert torch.equal(at.seed_N[:rows], before[slot_N, Int.SEED])
    assert torch.equal(at.made_N[:rows], before[slot_N, Int.MADE])
    at.token_N[:rows], at.logprob_N[:rows] = token_C[slot_N], logprob_C[slot_N]
    assert at.sampled() == int((mine.state.ints[slot_N, Int.LIVE] == 0).sum()) > 0
    rows = at.entering(SLOTS)
    slot_N = at.slot_N[:rows]
    if mine.geometry.outer_entries:
        assert at.placed_outside(own.pointer) == int(mine.state.ints[slot_N, Int.NUMBER].max()) + 1
        found = *own.rotary, own.page_N, own.place_N, own.seen.row_N, own.seen.last_N
        for value, expected in zip(found, places, strict=True):
            assert torch.equal(value[:rows], expected[slot_N])
    assert torch.equal(at.x_ND[:rows], x_CD[slot_N])
    at.goes_on_N[:rows], at.gate_N[:rows] = takes_C[slot_N].long(), gate_C[slot_N]
    at.entered()
    mine.state.lengths[:, : mine.geometry.num_recursions] = other.state.lengths[:, : mine.geometry.num_recursions]
    check_alike(mine, other)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@torch.inference_mode()
def test_slots_go_round(kv_cache: str) -> None:
    """Rows find their places, and what the block made of them settles in their slots."""
    mine, other, twin = both(kv_cache=kv_cache)
    _, [places] = twin.enter(SLOTS, None)
    at = mine.steps
    own = RowPlaces(SLOTS, mine.geometry, mine.state.tables.flatten(0, 1), mine.geometry.overlay_RXP)
    rows = at.going(SLOTS)
    slot_N = at.slot_N[:rows]
    assert torch.equal(at.x_ND[:rows], mine.state.x[slot_N])
    assert at.placed_inside(own.pointer, -1) == int(own.seen.last_N[:rows].max()) + 1
    found = [*own.rotary, own.page_N, own.place_N, own.seen.row_N, own.seen.last_N, *(own.seen.overlay or ())[:1]]
    for value, expected in zip(found, places, strict=True):
        assert torch.equal(value[:rows], expected[slot_N])
    if mine.geometry.overlay_RXP is not None and other.geometry.overlay_RXP is not None:
        nobodys = mine.geometry.nobodys
        assert torch.equal(mine.geometry.overlay_RXP[:, :nobodys], other.geometry.overlay_RXP[:, :nobodys])

    stream_ND, x_ND = torch.randn(2, SLOTS, at.x_ND.shape[1])
    takes_N, gate_N = torch.rand(SLOTS) < 0.5, torch.rand(SLOTS)
    twin.settle(SLOTS, Merged(stream_ND=stream_ND, x_ND=x_ND, taken_N=takes_N, gate_N=gate_N))
    at.stream_ND[:rows], at.x_ND[:rows] = stream_ND[slot_N], x_ND[slot_N]
    at.goes_on_N[:rows], at.gate_N[:rows] = takes_N[slot_N].long(), gate_N[slot_N]
    at.settled()
    runs_N = torch.zeros(SLOTS, dtype=torch.bool).index_fill(0, slot_N, True)
    for each in (mine, other):  # the twin also writes to rows that take no part
        each.state.ints[:SLOTS, Int.LIVE] *= runs_N
    check_alike(mine, other)


@pytest.mark.parametrize(("column", "value"), [(Float.TOP_P, 0.5), (Float.MIN_P, 0.1), (Int.TOP_K, 3)])
def test_says_whether_a_draw_is_limited(column: Int | Float, value: float) -> None:
    mine, *_ = both()
    columns = mine.state.ints if isinstance(column, Int) else mine.state.floats
    slot = int(mine.steps.slot_N[: mine.steps.finishing(SLOTS)][1])
    assert not mine.steps.is_limited
    columns[slot, column] = value
    mine.steps.finishing(SLOTS)
    assert mine.steps.is_limited
