"""One block, many recursions: the heart of the model.

The block is one `nn.ModuleList` called up to R times. With a router, each recursion gathers the tokens that take it,
runs the block on them alone, and adds the result back in place; a token that stopped costs nothing.

Legend: B rows, T tokens of a row, A tokens alive before a recursion, K tokens that take it, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .configuration_mor import MorConfig
from .decision import DecisionRule
from .forward_pass import ForwardPass
from .layers import MorDecoderLayer
from .routers import build_router
from .routing import Choice, RecursionTrace, Route, RoutingInput, Visit
from .token_set import TokenSet


@dataclass(kw_only=True)
class RecursionOutput:
    """`x_BTD`: residual stream. `depth_BT`: block applications per token. `hidden`: the stream after each recursion
    (each layer, without a router), if collected."""

    x_BTD: Tensor
    depth_BT: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    traces: list[RecursionTrace] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


class Recursion(nn.Module):
    """The shared block and its router."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        self.plan = config.depth_plan
        self.block = nn.ModuleList(MorDecoderLayer(config) for _ in range(self.plan.block_size))
        self.router = build_router(config)

    def forward(
        self, x_BTD: Tensor, current: ForwardPass, rule: DecisionRule | None = None, *, collect_hidden: bool = False
    ) -> RecursionOutput:
        """Apply the block as often as the router, or the plan without one, says."""
        if self.router is None:
            return self._unrouted(x_BTD, current, collect_hidden)
        assert rule is not None
        route = self.router.begin(
            RoutingInput(x_BTD=x_BTD, tokens=current.tokens, number_BT=current.number_BT, rule=rule)
        )
        return self._routed(x_BTD, current, route, collect_hidden)

    def _unrouted(self, x_BTD: Tensor, current: ForwardPass, collect_hidden: bool) -> RecursionOutput:
        output = RecursionOutput(x_BTD=x_BTD, depth_BT=torch.zeros_like(current.number_BT))
        scopes = [current.scope(r, current.tokens) for r in range(self.plan.num_recursions)]
        for step in self.plan.block_steps:
            assert step.block_layer is not None and step.recursion is not None
            scope, layer = scopes[step.recursion], self.block[step.block_layer]
            output.x_BTD = scope.on_rows(
                output.x_BTD, partial(self._checkpointed, partial(layer, scope=scope, layer=step.layer))
            )
            if collect_hidden:
                output.hidden.append(output.x_BTD)
        output.depth_BT = output.depth_BT + self.plan.num_recursions
        return output

    def _routed(self, x_BTD: Tensor, current: ForwardPass, route: Route, collect_hidden: bool) -> RecursionOutput:
        output = RecursionOutput(x_BTD=x_BTD, depth_BT=torch.zeros_like(current.number_BT), losses=route.losses)
        alive, alive_BAD = current.tokens, x_BTD
        for recursion in range(self.plan.num_recursions):
            choice = route.choose(recursion, alive_BAD, alive)
            if choice.scores is not None:
                output.traces.append(_trace(recursion, choice, alive, current))
            alive, alive_BAD = self._visit(recursion, choice, alive, alive_BAD, current, route, output)
            if collect_hidden:
                output.hidden.append(output.x_BTD)
            if alive.is_empty:
                break
        return output

    def _visit(
        self,
        recursion: int,
        choice: Choice,
        alive: TokenSet,
        alive_BAD: Tensor,
        current: ForwardPass,
        route: Route,
        output: RecursionOutput,
    ) -> tuple[TokenSet, Tensor]:
        """One recursion: run the block on the chosen tokens, merge; returns who is alive after it, and their
        vectors.
        """
        active = alive.compose(choice.chosen)
        x_BKD = choice.chosen.gather(alive_BAD)
        if recursion == 0 and current.first_serves_all and not choice.chosen.is_everything:
            y_BKD = choice.chosen.gather(self._apply_block(recursion, alive_BAD, alive, current))
        elif active.is_empty:
            return active, x_BKD
        else:
            y_BKD = self._apply_block(recursion, x_BKD, active, current)
        visit = Visit(x_BKD=x_BKD, y_BKD=y_BKD, gate_BK=choice.gate_BK, active=active)
        output.x_BTD, x_BKD = route.merge(recursion, output.x_BTD, visit)
        output.depth_BT = active.add(output.depth_BT, torch.ones_like(choice.gate_BK, dtype=output.depth_BT.dtype))
        return active, x_BKD

    def _apply_block(self, recursion: int, x_BKD: Tensor, active: TokenSet, current: ForwardPass) -> Tensor:
        scope = current.scope(recursion, active)
        first = self.plan.application(recursion, 0)

        def run(x_BKD: Tensor) -> Tensor:
            for j, layer in enumerate(self.block):
                x_BKD = layer(x_BKD, scope, first + j)
            return x_BKD

        return scope.on_rows(x_BKD, partial(self._checkpointed, run))

    def _checkpointed(self, run: Callable[[Tensor], Tensor], x_BKD: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(run, x_BKD)
        return run(x_BKD)


def _trace(recursion: int, choice: Choice, alive: TokenSet, current: ForwardPass) -> RecursionTrace:
    scores = choice.scores
    assert scores is not None
    shape, device = scores.gate_BA.shape, scores.gate_BA.device
    places_BA = alive.places(current.number_BT.shape, device)
    valid_BA = alive.valid_BK
    return RecursionTrace(
        recursion=recursion,
        token_index_BA=places_BA if current.column_BT is None else current.column_BT.gather(1, places_BA),
        valid_BA=torch.ones(shape, dtype=torch.bool, device=device) if valid_BA is None else valid_BA,
        logits_BA=scores.logits_BA,
        decisive_BA=scores.decisive_BA,
        gate_BA=scores.gate_BA,
        kept_BA=choice.chosen.mask(shape, device),
    )
