"""Routers: who goes round again, and how a recursion's output enters the residual stream.

Add a router by writing a `Router` and its `Route`, and naming it in `routers.build_router` and
`configuration_mor.ROUTERS`.

Legend: B rows, T tokens of a row, A tokens alive before a recursion, K tokens that take it, D hidden size, R
recursions, G calibration points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mor import MorConfig
from .decision import CalibrationRule, DecisionRule, Quantile, Threshold, TopK, budget_shares
from .token_set import TokenSet


@dataclass(frozen=True, kw_only=True)
class RecursionTrace:
    """What a router saw and did at one recursion (token-choice: one trace for all).

    `token_index_BA`: the scored tokens' columns in the input. `valid_BA`: which are real. `logits_BA`: (B, A), or
    (B, A, R) for token-choice. `gate_BA`: factor on the block's output. `kept_BA`: which took the recursion
    (token-choice: all). `decisive_BA`: what the causal rule compares: the auxiliary router's logits if there is one,
    else `logits_BA` (the fixed router: token numbers).
    """

    recursion: int
    token_index_BA: Tensor
    valid_BA: Tensor
    logits_BA: Tensor
    gate_BA: Tensor
    kept_BA: Tensor
    decisive_BA: Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A router's view of the tokens alive at one recursion: logits, gates, and what the causal rule compares; all (B,
    A), but token-choice's logits (B, A, R)."""

    logits_BA: Tensor
    decisive_BA: Tensor
    gate_BA: Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Tokens chosen among the alive ones at one recursion, their gates, and the scores if any were taken."""

    chosen: TokenSet
    gate_BK: Tensor
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The block's input and output at one recursion (B, K, D), the gates (B, K), and which of all tokens took it."""

    x_BKD: Tensor
    y_BKD: Tensor
    gate_BK: Tensor
    active: TokenSet


@dataclass(frozen=True, kw_only=True)
class RoutingInput:
    """What a router may look at: the residual stream entering the recursions, which tokens are real, and each token's
    number among its row's real tokens (earlier forwards included)."""

    x_BTD: Tensor
    tokens: TokenSet
    number_BT: Tensor
    rule: DecisionRule

    @property
    def num_tokens(self) -> Tensor | int:
        """Real tokens per row."""
        return self.x_BTD.shape[1] if self.tokens.valid_BK is None else self.tokens.valid_BK.sum(1)


class Route(Protocol):
    """One forward's routing, recursion by recursion."""

    losses: dict[str, Tensor]

    def choose(self, recursion: int, x_BAD: Tensor, alive: TokenSet) -> Choice:
        """Score the alive tokens and choose those that take this recursion."""
        ...

    def merge(self, recursion: int, stream_BTD: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        """The residual stream after a recursion, and the next recursion's input (B, K, D)."""
        ...


class ScoreHead(nn.Sequential):
    """Router network from D to `num_scores`: linear, or D -> expansion * D -> scores with exact GELU; no biases."""

    def __init__(self, config: MorConfig, num_scores: int) -> None:
        size = config.hidden_size
        expansion = {"linear": 0, "mlp": 2, "wide_mlp": 4}[config.router_architecture]
        if expansion == 0:
            super().__init__(nn.Linear(size, num_scores, bias=False))
        else:
            hidden = nn.Linear(size, expansion * size, bias=False)
            super().__init__(hidden, nn.GELU(), nn.Linear(expansion * size, num_scores, bias=False))

    def forward(self, x_BAD: Tensor) -> Tensor:
        """Scores (B, A, num_scores) in float32 whatever the model's dtype: decisions are sensitive to rounding."""
        with torch.autocast(x_BAD.device.type, enabled=False):
            x = x_BAD.float()
            for module in self:
                x = _project(x, module.weight.float()) if isinstance(module, nn.Linear) else module(x)
            return x


def _project(x_BAD: Tensor, weight_ED: Tensor) -> Tensor:
    """`F.linear`; to a few outputs as sums of products, which compiled code fuses with what made `x`, without a float32
    copy of it, and which do not depend on the number of tokens."""
    if len(weight_ED) > 8:
        return F.linear(x_BAD, weight_ED)
    return torch.stack([(x_BAD * weight_D).sum(-1) for weight_D in weight_ED], dim=-1)


_GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


class Router(nn.Module):
    """What all routers share: training's forward counter and the calibration table.

    `calibration_mean_depth` (G,) and `calibration_thresholds` (G, R) travel with the weights; NaN is uncalibrated.
    `pads_sets`: in training a set whose size is a decision has a place for every token alive before it, most of them
    absent, so that no size is read from the device.
    """

    training_forwards: Tensor
    calibration_mean_depth: Tensor
    calibration_thresholds: Tensor
    decisions: tuple[str, ...] = ("causal",)
    can_budget: bool = False
    rank: int = 0
    num_ranks: int = 1
    pads_sets: bool = False

    def __init__(self, config: MorConfig) -> None:
        super().__init__()
        self.num_recursions = config.num_recursions
        self.config = config
        assert config.router_alpha is not None
        self.alpha = float(config.router_alpha)
        points = config.num_calibration_points
        self.register_buffer("training_forwards", torch.zeros((), dtype=torch.int64))
        shape = (points, config.num_recursions)
        self.register_buffer("calibration_mean_depth", torch.full((points,), math.nan, dtype=torch.float32))
        self.register_buffer("calibration_thresholds", torch.full(shape, math.nan, dtype=torch.float32))
        self._forwards: int | None = None
        self.register_load_state_dict_post_hook(_forget_count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model, but keep thresholds and biases in float32: a cast to bfloat16 would round them away."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def initial_buffers(self) -> dict[str, float]:
        """Values of the buffers of a router that is neither trained nor calibrated."""
        return {"training_forwards": 0, "calibration_mean_depth": math.nan, "calibration_thresholds": math.nan}

    def count_forward(self) -> int:
        """Count a training forward, in `state_dict` and on the host; returns how many there were, this one included.

        Where `num_ranks` processes train together, the forwards that all of them run at a time are counted in the order
        of ranks.
        """
        if self._forwards is None:
            self._forwards = int(self.training_forwards)
        number = self._forwards + 1 + self.rank
        self._forwards += self.num_ranks
        self.training_forwards.add_(self.num_ranks)  # not filled with the host's: replays of a CUDA graph count too
        return number

    @property
    def warmup_forwards(self) -> int:
        """How many of the first training forwards have rules of their own; the later ones share one."""
        return 0

    @property
    def has_padded_sets(self) -> bool:
        """Whether this forward's sets are padded."""
        return self.training and self.pads_sets

    def _tempered(self, x_BAD: Tensor) -> Tensor:
        """The router's input divided by the temperature."""
        return x_BAD if self.config.router_temperature == 1 else x_BAD / self.config.router_temperature

    @property
    def trained_shares(self) -> list[float]:
        """Shares of tokens active at each recursion that training aimed at."""
        raise NotImplementedError

    def default_rule(self) -> DecisionRule:
        """The causal rule of an uncalibrated model."""
        raise NotImplementedError

    def trained_rule(self) -> DecisionRule:
        """The rule of a training forward."""
        return self.default_rule()

    def calibration_rule(self, mean_depths: Sequence[float]) -> CalibrationRule:
        """A rule that finds the thresholds for each mean depth on its part of the batch it is used on."""
        raise NotImplementedError

    def rule(self, decision: str | DecisionRule, mean_depth: float | Tensor | None = None) -> DecisionRule:
        """The rule for a decision name, or an instance as it is. Raises ValueError for what this router cannot do."""
        if not isinstance(decision, str):
            return decision
        if decision not in self.decisions:
            names = " or ".join(self.decisions)
            raise ValueError(f"decision={decision!r} does not exist for router={self.config.router!r}; choose {names}")
        if decision == "top_k":
            return self._top_k_rule(mean_depth)
        if mean_depth is None:
            mean_depth = self.config.mean_depth
        return self.default_rule() if mean_depth is None else self.budget_rule(mean_depth)

    def budget_rule(self, mean_depth: float | Tensor) -> DecisionRule:
        """The causal rule that spends `mean_depth` block applications per token."""
        return Threshold(thresholds=self.thresholds(mean_depth))

    def _top_k_rule(self, mean_depth: float | Tensor | None) -> DecisionRule:
        if mean_depth is None:
            return TopK(capacities=self.trained_shares)
        return TopK(capacities=budget_shares(float(mean_depth), self.trained_shares))

    def thresholds(self, mean_depth: float | Tensor) -> Tensor:
        """Thresholds (R,), or (B, R) for a (B,) tensor, interpolated in the calibration table.

        Raises ValueError if the router has no budget, the model is uncalibrated, or the depth is out of reach.
        """
        if not self.can_budget:
            raise ValueError(
                f"mean_depth={mean_depth}: router={self.config.router!r} has a fixed depth, so no budget to set"
            )
        depth_G = self.calibration_mean_depth.double()
        if bool(depth_G.isnan().any()):
            raise ValueError(
                f"mean_depth={mean_depth} needs a calibrated model: run mor.model.calibrate (`mor calibrate`)"
            )
        asked = torch.as_tensor(mean_depth, dtype=torch.float64, device=depth_G.device)
        low, high = float(depth_G[0]), float(depth_G[-1])
        if bool(((asked < low) | (asked > high) | asked.isnan()).any()):
            raise ValueError(f"mean_depth={mean_depth} is impossible: this model can do {low:.3f} to {high:.3f}")
        right = torch.searchsorted(depth_G, asked.reshape(-1)).clamp(1, depth_G.numel() - 1)
        span = (depth_G[right] - depth_G[right - 1]).clamp(min=1e-9)
        weight = ((asked.reshape(-1) - depth_G[right - 1]) / span)[:, None]
        left_BR, right_BR = (self.calibration_thresholds.double()[index] for index in (right - 1, right))
        steps = left_BR.isinf() | right_BR.isinf()
        between_BR = torch.where(steps, left_BR, left_BR + weight * (right_BR - left_BR))
        found_BR = torch.where(weight == 1, right_BR, between_BR).float()
        for depth in (1, self.num_recursions):
            extreme_R = torch.tensor(self.extreme_thresholds(depth), device=found_BR.device)
            found_BR = torch.where((asked.reshape(-1) == depth)[:, None], extreme_R, found_BR)
        return found_BR[0] if asked.dim() == 0 else found_BR

    def extreme_thresholds(self, depth: int) -> list[float]:
        """Thresholds that give every token depth 1, or every token the greatest depth."""
        raise NotImplementedError

    def begin(self, inputs: RoutingInput) -> Route:
        """Start routing one forward."""
        raise NotImplementedError

    def measurements(self) -> tuple[Tensor, ...]:
        """What training forwards add up for `update_bias`, to be summed over processes that train together."""
        return ()

    def update_bias(self) -> None:
        """Move what is learnt outside the gradient, after an optimizer step."""


class RecursionRouter(Router):
    """A router that scores tokens anew before each recursion; who stops is not asked again (hierarchical filtering)."""

    can_budget = True

    def calibration_rule(self, mean_depths: Sequence[float]) -> CalibrationRule:
        return Quantile(shares=[budget_shares(depth, self.trained_shares) for depth in mean_depths])

    def extreme_thresholds(self, depth: int) -> list[float]:
        return [-math.inf if r < depth else math.inf for r in range(self.num_recursions)]

    def read(self, recursion: int, x_BAD: Tensor) -> tuple[Tensor, ...]:
        """What the scores before a recursion take from the tokens alive there, (B, A) each."""
        raise NotImplementedError

    def score(self, recursion: int, read: tuple[Tensor, ...], number_BA: Tensor) -> Scores:
        """Scores from what was read; `number_BA` is each token's number in its row."""
        raise NotImplementedError

    def advance(
        self, recursion: int, x_BKD: Tensor, y_BKD: Tensor, gate_BK: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stream after a recursion, and what the next one's scores read from it: one pass over the tokens."""
        if self.config.gating == "weighted":
            y_BKD = y_BKD * gate_BK[..., None].to(y_BKD.dtype)
        x_BKD = x_BKD + y_BKD
        following = recursion + 1
        return x_BKD, self.read(following, x_BKD) if following < self.num_recursions else ()

    def losses(self, scores: Scores, kept_BA: Tensor, valid_BA: Tensor | None) -> dict[str, Tensor]:
        """Unweighted losses of one recursion, in training."""
        return {}

    def begin(self, inputs: RoutingInput) -> Route:
        return RecursionRoute(self, inputs)

    def gate(self, logits_BA: Tensor) -> Tensor:
        """The gate of a token with this logit."""
        activation = self.config.router_activation
        return logits_BA if activation == "identity" else self.alpha * _GATES[str(activation)](logits_BA)


@dataclass
class RecursionRoute:
    """Expert-choice routing of one forward: x + gate * block(x) at every recursion a token takes."""

    router: RecursionRouter
    inputs: RoutingInput
    losses: dict[str, Tensor] = field(default_factory=dict)
    _read: tuple[Tensor, ...] = ()

    def choose(self, recursion: int, x_BAD: Tensor, alive: TokenSet) -> Choice:
        if recursion == 0:
            self._read = self.router.read(0, x_BAD)
        scores = self.router.score(recursion, self._read, alive.gather(self.inputs.number_BT))
        chosen = self.pick(recursion, scores, alive.valid_BK)
        return Choice(chosen=chosen, gate_BK=chosen.gather(scores.gate_BA), scores=scores)

    def pick(self, recursion: int, scores: Scores, valid_BA: Tensor | None) -> TokenSet:
        """The rule's choice; in training also its losses."""
        rule = self.inputs.rule
        compared_BA = scores.logits_BA if isinstance(rule, TopK) else scores.decisive_BA
        chosen = rule.choose(recursion, compared_BA.detach(), valid_BA, self.inputs.num_tokens)
        if self.router.training and isinstance(rule, TopK):
            self.add_losses(scores, chosen.mask(scores.logits_BA.shape, scores.logits_BA.device), valid_BA)
        return chosen

    def add_losses(
        self, scores: Scores, kept_BA: Tensor, valid_BA: Tensor | None, weight: Tensor | float = 1.0
    ) -> None:
        """Add the router's losses of one recursion, times `weight`, to those of the forward."""
        for name, loss in self.router.losses(scores, kept_BA, valid_BA).items():
            self.losses[name] = self.losses.get(name, 0.0) + weight * loss

    def merge(self, recursion: int, stream_BTD: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        x_BKD, self._read = self.router.advance(recursion, visit.x_BKD, visit.y_BKD, visit.gate_BK)
        return visit.active.put(stream_BTD, x_BKD), x_BKD


def _forget_count(router: Router, _: object) -> None:
    """After loading, the host's copy of the forward counter is stale."""
    router._forwards = None
