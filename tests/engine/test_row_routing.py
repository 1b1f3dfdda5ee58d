"""Routing in the C program beside the routers' own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine.row_routing import LinearRows, linear_rows, row_router
from mor.engine.slot_routing import SlotRouting, TokenChoiceSlots, Unrouted
from mor.engine.slot_state import RESTING, Float, Int
from mor.model.modeling_mor import MorForCausalLM
from tests.engine.native.row_state import SLOTS, slotted
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "threshold_choice": {"router": "threshold_choice"},
    "auxiliary_router": {"causal_method": "aux_router"},
    "tanh": {"router_activation": "tanh"},
    "identity": {"router_activation": "identity"},
    "additive": {"gating": "additive"},
    "tempered": {"router_temperature": 0.5},
    "strong": {"router_alpha": 0.7},
    "none": {"router": "none", "sharing": "middle_cycle"},
}


def routed(kind: str) -> tuple[MorForCausalLM, SlotRouting]:
    model = tiny_model(**{"router": "expert_choice", **KINDS[kind]})
    router = model.model.recursion.router
    routing = Unrouted(model.config.depth_plan) if router is None else linear_rows(router)
    assert routing is not None
    return model, routing


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_that_enter_are_routed_as_by_the_router(kind: str) -> None:
    model, routing = routed(kind)
    own, router = slotted(model), row_router(routing)
    own.state.ints[:, Int.RECURSION] = RESTING
    rows, at = own.steps.entering(SLOTS), own.steps
    at.x_ND.normal_()
    assert router is not None
    at.begun(router.pointer)
    slot_N = at.slot_N[:rows]
    begun = routing.begin(at.x_ND[:rows], own.state.ints[slot_N], own.state.floats[slot_N])
    assert torch.equal(at.goes_on_N[:rows] > 0, begun.taken_N) and begun.taken_N.any()
    check_close(at.gate_N[:rows], begun.gate_N)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_blocks_output_is_merged_as_by_the_router(kind: str) -> None:
    model, routing = routed(kind)
    own, router = slotted(model), row_router(routing)
    if kind == "none":
        own.state.ints[:, Int.ACTIVE], own.state.floats[:, Float.GATE] = 1, 1
    rows, at = own.steps.going(SLOTS), own.steps
    slot_N, y_ND = at.slot_N[:rows], torch.randn_like(at.x_ND[:rows])
    each = own.state.ints[slot_N], own.state.floats[slot_N]
    merged = routing.merge(own.state.stream[slot_N], own.state.x[slot_N], y_ND, *each)
    at.x_ND[:rows] = y_ND
    assert router is not None
    at.merged(router.pointer)
    assert torch.equal(at.goes_on_N[:rows] > 0, merged.taken_N) and 0 < int(merged.taken_N.sum()) < rows
    check_close(at.stream_ND[:rows], merged.stream_ND)
    check_close(at.x_ND[:rows], merged.x_ND)
    check_close(at.gate_N[:rows][merged.taken_N], merged.gate_N[merged.taken_N].float())


@pytest.mark.parametrize("settings", [{"router": "random"}, {"router": "fixed"}, {"router_architecture": "mlp"}])
def test_other_routers_are_left_to_themselves(settings: dict[str, Any]) -> None:
    assert linear_rows(tiny_model(**{"router": "expert_choice", **settings}).model.recursion.router) is None


def test_the_c_program_leaves_other_routing_to_pytorch() -> None:
    router = tiny_model(router="token_choice").model.recursion.router
    assert row_router(TokenChoiceSlots(router)) is None
    router = tiny_model(router="expert_choice").model.recursion.router
    assert isinstance(linear_rows(router), LinearRows)
