"""Routing in numpy beside the routers' own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine.row_routing import LinearRows, linear_rows
from mor.engine.slot_routing import Begun, Merged, RecursionSlots
from mor.engine.slot_state import NUM_STOPS, Float, Int
from mor.model.routing import RecursionRouter
from tests.tiny import tiny_model

ROWS, RECURSIONS = 40, 3
KINDS: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "threshold_choice": {"router": "threshold_choice"},
    "auxiliary_router": {"causal_method": "aux_router"},
    "tanh": {"router_activation": "tanh"},
    "identity": {"router_activation": "identity"},
    "additive": {"gating": "additive"},
    "tempered": {"router_temperature": 0.5},
}


def both(**settings: Any) -> tuple[LinearRows, RecursionSlots]:
    router = tiny_model(**{"router": "expert_choice", "num_recursions": RECURSIONS, **settings}).model.recursion.router
    assert isinstance(router, RecursionRouter)
    rows = linear_rows(router)
    assert rows is not None
    return rows, RecursionSlots(router, None)


def state(hidden_size: int) -> tuple[torch.Tensor, ...]:
    """Streams, inputs and outputs of rows at all recursions, some of them inactive or at their limit."""
    torch.manual_seed(0)
    ints = torch.zeros(ROWS, Int.STOPS + NUM_STOPS, dtype=torch.int64)
    ints[:, Int.RECURSION] = torch.arange(ROWS) % RECURSIONS
    ints[:, Int.LIMIT] = 1 + torch.arange(ROWS) % 4 % RECURSIONS
    ints[:, Int.ACTIVE] = (torch.rand(ROWS) < 0.7).long()
    floats = torch.rand(ROWS, Float.THRESHOLDS + RECURSIONS, dtype=torch.float32)
    floats[:, Float.THRESHOLDS :] = 0.3 * torch.randn(ROWS, RECURSIONS)
    floats[::5, Float.THRESHOLDS :] = -torch.inf
    return *(torch.randn(3, ROWS, hidden_size).unbind()), ints, floats


def check_alike(mine: Begun | Merged, other: Begun | Merged, where: torch.Tensor | None = None) -> None:
    for name, value in vars(other).items():
        found, value = (tensor if where is None else tensor[where] for tensor in (getattr(mine, name), value))
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_are_routed_as_by_the_router(kind: str) -> None:
    rows, slots = both(**KINDS[kind])
    stream, x, y, ints, floats = state(slots._router.config.hidden_size)
    check_alike(rows.begin(x, ints, floats), slots.begin(x, ints, floats))
    merged = slots.merge(stream, x, y, ints, floats)
    found = rows.merge(stream, x, y, ints, floats)
    assert 0 < int(merged.taken_N.sum()) < ROWS
    check_alike(found, merged, ints[:, Int.ACTIVE] > 0)
    torch.testing.assert_close(found.stream_ND, merged.stream_ND)
    assert torch.equal(found.taken_N, merged.taken_N)


@pytest.mark.parametrize("settings", [{"router": "random"}, {"router": "fixed"}, {"router_architecture": "mlp"}])
def test_other_routers_are_left_to_themselves(settings: dict[str, Any]) -> None:
    assert linear_rows(tiny_model(**{"router": "expert_choice", **settings}).model.recursion.router) is None
