"""Which routing of slots the C program does by itself, on a CPU: none, and that by linear scores."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from mor.engine.native.row_steps import RowRouter
from mor.engine.slot_routing import RecursionSlots, SlotRouting, Unrouted
from mor.model.expert_choice import ExpertChoiceRouter
from mor.model.routing import Router, ScoreHead


def linear_rows(router: Router | None) -> LinearRows | None:
    """Routing for a router that decides by thresholds on linear scores, None for others."""
    if isinstance(router, ExpertChoiceRouter) and router.config.router_architecture == "linear":
        return LinearRows(router)
    return None


class LinearRows(RecursionSlots):
    """Expert-choice, and what is built on it: x + gate * block(x). `row_router`: the same for the C program."""

    def __init__(self, router: ExpertChoiceRouter) -> None:
        super().__init__(router, None)
        config, auxiliary = router.config, router.auxiliary_heads
        activation = str(config.router_activation)
        self.row_router = RowRouter(
            _weights(router.heads),
            () if auxiliary is None else _weights(auxiliary),
            activation=activation,
            alpha=1.0 if activation == "identity" else router.alpha,
            temperature=config.router_temperature,
            is_weighted=config.gating == "weighted",
        )


def row_router(routing: SlotRouting) -> RowRouter | None:
    """What the C program needs to route by itself, None where it cannot."""
    if isinstance(routing, LinearRows):
        return routing.row_router
    return RowRouter() if isinstance(routing, Unrouted) else None


def _weights(heads: nn.ModuleList) -> list[Tensor]:
    """The weights of each recursion's head, not copies of them: they may be trained on."""
    return [cast(nn.Linear, head[0]).weight.detach() for head in heads if isinstance(head, ScoreHead)]
