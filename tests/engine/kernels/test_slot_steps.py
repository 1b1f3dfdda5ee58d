"""The steps of a visit: kernels leave the state, and give the rows, that their twins do."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.engine import slot_steps as plain
from mor.engine.kernels.slot_steps import SlotSteps
from mor.engine.kv_store import PageLayout
from mor.engine.slot_routing import Begun, Merged
from mor.engine.slot_state import NOTHING, NUM_STOPS, RESTING, Int, SlotState
from mor.engine.slot_steps import Entering, Geometry
from mor.model.configuration_mor import MorConfig

SLOTS, LENGTH, HIDDEN, SIZE, VOCABULARY, NOBODYS = 11, 40, 24, 16, 30, 0
LAYOUTS: list[dict[str, Any]] = [
    dict(num_recursions=3, sharing="middle_cycle", kv_cache="recursion", router="expert_choice"),
    dict(num_recursions=3, sharing="middle_cycle", kv_cache="shared", router="token_choice"),
    dict(num_recursions=3, sharing="middle_cycle", kv_cache="hybrid", router="expert_choice"),
    dict(num_recursions=2, sharing="cycle", kv_cache="recursion", router="expert_choice"),
    dict(num_recursions=2, sharing="cycle", kv_cache="hybrid", router="token_choice"),
    dict(num_recursions=3, sharing="middle_sequence", kv_cache="recursion"),
    dict(num_recursions=3, sharing="middle_sequence", kv_cache="shared"),
    dict(num_recursions=3, sharing="middle_sequence", kv_cache="hybrid"),
    dict(num_recursions=1, sharing="none"),
]


def state_of(config: MorConfig, device: torch.device, seed: int) -> tuple[SlotState, Geometry]:
    """Slots at all stages: empty, new, resting, in the block."""
    layout = PageLayout.of(config, 4)
    like = torch.empty(0, device=device)
    state = SlotState(layout, SLOTS, LENGTH, hidden_size=HIDDEN, most_visits=2, like=like)
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    state.ints.copy_(draw(3, *state.ints.shape))
    for column, (low, high) in {
        Int.TOKEN: (0, VOCABULARY),
        Int.NUMBER: (1, LENGTH - 1),
        Int.RECURSION: (RESTING, config.num_recursions),
        Int.ACTIVE: (0, 2),
        Int.LIVE: (0, 2),
        Int.FRESH: (0, 2),
        Int.LEFT: (1, 3),
    }.items():
        state.ints[:, column] = draw(high, SLOTS + 1, low=low)
    if config.depth_plan.is_sequence:
        state.ints[:, Int.RECURSION].clamp_(max=0)
    state.ints[:, Int.STOPS :] = draw(VOCABULARY, SLOTS + 1, NUM_STOPS)
    state.ints[2, Int.LIVE], state.ints[2, Int.RECURSION] = 1, RESTING
    state.ints[SLOTS] = 0
    state.floats.copy_(torch.rand(state.floats.shape, generator=generator))
    state.lengths.copy_(draw(LENGTH // 2, *state.lengths.shape))
    pages = 1 + torch.randperm(state.tables.numel(), generator=generator)
    state.tables.copy_(pages.view_as(state.tables))
    for tensor in (state.stream, state.x):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state.visit.fill_(1)
    cos_LE, sin_LE = torch.randn(2, LENGTH, SIZE, generator=generator).to(device)
    plan, policy = config.depth_plan, config.kv_cache
    overlay_RXP = draw(9, layout.num_overlaying, 1 + len(pages), layout.page_entries).int()
    return state, Geometry(
        cos_LE=cos_LE,
        sin_LE=sin_LE,
        num_recursions=plan.num_recursions,
        nobodys=NOBODYS,
        block_entries=layout.page_entries,
        outer_entries=layout.outer_entries,
        taken=plan.num_recursions if plan.is_sequence else 1,
        reads_first=policy != "recursion",
        writes_own=policy != "shared",
        overlay_RXP=overlay_RXP if layout.num_overlaying else None,
    )


def visited(steps: Any, state: SlotState, slots: int, turns: int, seed: int) -> list[Tensor]:
    """What comes of the four steps, with made-up tokens and router's decisions, and the state after them."""
    generator = torch.Generator().manual_seed(seed)
    device = state.device

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if not turns:
        y_ND, each = steps.enter(slots, None)
        return [y_ND, *(part for places in each for part in places), state.lengths[:-1], state.ints[:-1]]
    turning = steps.turn(slots, turns)
    found = [turning.slot_C, turning.place_N, turning.ints_CI.clone(), turning.floats_CF, turning.x_CD]
    found += list(turning.places)
    token_C = torch.randint(-1, VOCABULARY, (turns,), generator=generator).to(device)
    token_C[::3] = turning.ints_CI[::3, Int.STOPS + 2]
    x_CD, places = steps.advance(turning, token_C, some(turns), some(VOCABULARY, HIDDEN))
    found += [turning.ints_CI.clone(), state.lengths.clone(), x_CD, *places]
    target_C = torch.randint(0, 3, (turns,), generator=generator).to(device)
    begun = Begun(taken_N=some(turns) > 0, gate_N=some(turns), target_N=target_C)
    y_ND, each = steps.enter(slots, Entering(turning=turning, x_CD=some(turns, HIDDEN), begun=begun))
    found += [y_ND, *(part for places in each for part in places)]
    found += [tensor[:-1].clone() for tensor in (state.ints, state.floats, state.stream, state.x, state.lengths)]
    merged = some(slots, HIDDEN)
    steps.settle(
        slots,
        Merged(stream_ND=merged, x_ND=2 * merged, taken_N=some(slots) > 0, gate_N=some(slots).double()),
    )
    found += [tensor[:-1] for tensor in (state.ints, state.floats, state.stream, state.x, state.lengths)]
    return [*found, state.reports[:, :, :-1], state.visit]


@pytest.mark.parametrize("turns", [0, 1, 4, 9])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout['sharing']}-{layout.get('kv_cache')}")
def test_steps_are_their_twins(device: torch.device, layout: dict[str, Any], turns: int) -> None:
    slots = 9
    config = MorConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=SIZE,
        **layout,
    )
    for seed in range(3):
        state, geometry = state_of(config, device, seed)
        twin = copy(state)
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                setattr(twin, name, value.clone())
        state.reports.fill_(NOTHING), twin.reports.fill_(NOTHING)
        before = None if geometry.overlay_RXP is None else geometry.overlay_RXP.clone()
        ours = visited(SlotSteps(state, geometry), state, slots, turns, seed)
        if before is not None and geometry.overlay_RXP is not None:
            ours.append(geometry.overlay_RXP[:, 1 + NOBODYS :])
            assert not torch.equal(ours[-1], before[:, 1 + NOBODYS :])
            geometry = replace(geometry, overlay_RXP=before)
        theirs = visited(plain.SlotSteps(twin, geometry), twin, slots, turns, seed)
        theirs += [] if before is None else [before[:, 1 + NOBODYS :]]
        assert len(ours) == len(theirs)
        assert 2 in ours[0].tolist() or turns < 3
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert mine.dtype == other.dtype, number
            if turns and number == len(ours) - 2 - (
                before is not None
            ):  # reports: nothing is said of slots that did not sample
                mine, other = (torch.where(each[:, :1] == NOTHING, NOTHING, each) for each in (mine, other))
            torch.testing.assert_close(mine, other, rtol=0, atol=0, msg=lambda text, n=number: f"{n}: {text}")
