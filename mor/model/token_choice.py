"""Token-choice routing: a token picks its depth once, before the first recursion (arXiv 2507.10524, 2.2).

Legend: B rows, T tokens of a row, A tokens alive before a recursion, K tokens that take it, D hidden size, R
recursions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .configuration_mor import MorConfig
from .decision import CalibrationRule, DecisionRule
from .router_losses import balancing_loss, depth_load, z_loss
from .routing import Choice, Route, Router, RoutingInput, ScoreHead, Scores, Visit
from .token_set import HostCounts, TokenSet, on_device


class DepthRule:
    """Adds `bias`, (R,) or (B, R), to the scores of the depths before the argmax. Causal: a token looks at itself."""

    is_causal = True

    def __init__(self, *, bias: Tensor | None = None) -> None:
        self.bias = bias

    def depth(self, score_BTR: Tensor, valid_BT: Tensor | None) -> Tensor:
        """The chosen depths (B, T), 0-based."""
        if self.bias is not None:
            score_BTR = score_BTR + (self.bias if self.bias.dim() == 1 else self.bias[:, None])
        return score_BTR.argmax(dim=-1)

    def choose(
        self,
        recursion: int,
        score_BA: Tensor,
        valid_BA: Tensor | None,
        num_tokens: Tensor | int,
        size: int | None = None,
    ) -> TokenSet:
        """`score_BA`: the depths chosen. Everyone takes the first recursion. `size`: places, if known."""
        if recursion == 0:
            return TokenSet(valid_BK=valid_BA)
        keep_BA = score_BA >= recursion
        return TokenSet.from_mask(keep_BA if valid_BA is None else keep_BA & valid_BA, size)


class TiltSearch(DepthRule):
    """Calibration's rule: tilts the scores by t * depth, with the t that gives a mean depth on a part of the batch: as
    many parts as mean depths, of as many rows each. The host does not wait for what is found."""

    is_causal = False

    def __init__(self, *, mean_depths: Sequence[float], reach: float) -> None:
        super().__init__()
        self.mean_depths, self._reach = mean_depths, reach
        self.thresholds: list[Tensor] = []

    def depth(self, score_BTR: Tensor, valid_BT: Tensor | None) -> Tensor:
        parts = len(self.mean_depths)
        score_GNR = score_BTR.reshape(parts, -1, score_BTR.shape[-1])
        weight_GN = torch.ones_like(score_GNR[..., 0], dtype=torch.float64)
        if valid_BT is not None:
            weight_GN = weight_GN * valid_BT.reshape(parts, -1)
        ladder_R = torch.arange(score_BTR.shape[-1], device=score_BTR.device, dtype=score_BTR.dtype)
        asked_G = on_device(self.mean_depths, score_BTR.device)
        low_G = torch.full_like(asked_G, -self._reach, dtype=torch.float64)
        high_G = -low_G
        for _ in range(40):
            middle_G = (low_G + high_G) / 2
            depth_GN = (score_GNR + middle_G.to(ladder_R)[:, None, None] * ladder_R).argmax(-1) + 1
            is_less_G = (depth_GN * weight_GN).sum(1) / weight_GN.sum(1) < asked_G
            low_G, high_G = torch.where(is_less_G, middle_G, low_G), torch.where(is_less_G, high_G, middle_G)
        bias_GR = high_G.to(ladder_R)[:, None] * ladder_R
        self.thresholds = list(bias_GR.unbind(1))
        self.bias = bias_GR.repeat_interleave(len(score_BTR) // parts, dim=0)
        return super().depth(score_BTR, valid_BT)


class TokenChoiceRouter(Router):
    """One head with R scores per token, read at the input of the recursions; the argmax is the depth."""

    load_bias: Tensor
    load_sum: Tensor
    can_budget = True

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.head = ScoreHead(config, config.num_recursions)
        self.register_buffer("load_bias", torch.zeros(config.num_recursions, dtype=torch.float32))
        load_sum = torch.zeros(config.num_recursions, dtype=torch.float32)
        self.register_buffer("load_sum", load_sum, persistent=False)

    def initial_buffers(self) -> dict[str, float]:
        return {**super().initial_buffers(), "load_bias": 0, "load_sum": 0}

    @property
    def trained_shares(self) -> list[float]:
        """Balanced use of the depths."""
        return [1 - r / self.num_recursions for r in range(self.num_recursions)]

    def default_rule(self) -> DecisionRule:
        return DepthRule()

    def budget_rule(self, mean_depth: float | Tensor) -> DecisionRule:
        return DepthRule(bias=self.thresholds(mean_depth))

    def calibration_rule(self, mean_depths: Sequence[float]) -> CalibrationRule:
        return TiltSearch(mean_depths=mean_depths, reach=2 * abs(self.alpha) + 1)

    def extreme_thresholds(self, depth: int) -> list[float]:
        return [0.0 if r == depth - 1 else -math.inf for r in range(self.num_recursions)]

    def trained_rule(self) -> DecisionRule:
        """The argmax; during warm-up, every token the greatest depth."""
        if self.count_forward() >= self.config.balancing_warmup_steps:
            return self.default_rule()
        self.load_bias.zero_()
        return DepthRule(bias=torch.tensor(self.extreme_thresholds(self.num_recursions), device=self.load_bias.device))

    @property
    def warmup_forwards(self) -> int:
        return self.config.balancing_warmup_steps

    def read(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, R)."""
        return self.head(self._tempered(x_BTD))  # type: ignore[no-any-return]

    def pick(self, x_BTD: Tensor, rule: DepthRule, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens' depths (0-based) and gates, (B, T) each, and the logits (B, T, R)."""
        logits_BTR = self.read(x_BTD)
        score_BTR = self._scores(logits_BTR)
        biased_BTR = score_BTR.detach() + self.load_bias if self.config.balancing == "loss_free" else score_BTR.detach()
        depth_BT = rule.depth(biased_BTR, valid_BT)
        return depth_BT, score_BTR.gather(-1, depth_BT[..., None]).squeeze(-1), logits_BTR

    def _scores(self, logits_BTR: Tensor) -> Tensor:
        activate = torch.sigmoid if self.config.router_activation == "sigmoid" else lambda z: z.softmax(dim=-1)
        return self.alpha * activate(logits_BTR)

    def begin(self, inputs: RoutingInput) -> Route:
        assert isinstance(inputs.rule, DepthRule)
        valid_BT = inputs.tokens.valid_BK
        depth_BT, gate_BT, logits_BTR = self.pick(inputs.x_BTD, inputs.rule, valid_BT)
        route = TokenRoute(self, inputs, depth_BT=depth_BT, gate_BT=gate_BT, logits_BTR=logits_BTR)
        if self.training:
            route.losses = self._losses(logits_BTR, depth_BT, valid_BT)
        return route

    def _losses(self, logits_BTR: Tensor, depth_BT: Tensor, valid_BT: Tensor | None) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        load_R = depth_load(depth_BT, self.num_recursions, valid_BT)
        if self.config.balancing == "loss":
            losses["balancing"] = balancing_loss(self._scores(logits_BTR), load_R, valid_BT)
        if self.config.balancing == "loss_free":
            self.load_sum += load_R
        if self.config.router_z_loss_coef:
            losses["router_z"] = z_loss(logits_BTR, valid_BT)
        return losses

    def measurements(self) -> tuple[Tensor, ...]:
        return (self.load_sum,) if self.config.balancing == "loss_free" else ()

    def update_bias(self) -> None:
        """b_r += u * sign(1/R - load_r), load averaged over the forwards since the last update (arXiv 2408.15664)."""
        total = self.load_sum.sum()
        if self.config.balancing != "loss_free":
            return
        load_R = self.load_sum / total.clamp(min=1e-9)
        step_R = self.config.balancing_update_rate * (1 / self.num_recursions - load_R).sign()
        self.load_bias += torch.where(total > 0, step_R, torch.zeros_like(step_R))
        self.load_sum.zero_()


@dataclass
class TokenRoute:
    """Token-choice routing of one forward: h <- block(h) until the chosen depth, then x + gate * h, once."""

    router: TokenChoiceRouter
    inputs: RoutingInput
    depth_BT: Tensor
    gate_BT: Tensor
    logits_BTR: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    _counts: HostCounts | None = None

    def __post_init__(self) -> None:
        """Send the sizes of all recursions to the host while the first one runs."""
        if self.router.has_padded_sets:
            return
        valid_BT = self.inputs.tokens.valid_BK
        levels = torch.arange(self.router.num_recursions, device=self.depth_BT.device)
        taken_BTR = self.depth_BT[..., None] >= levels
        if valid_BT is not None:
            taken_BTR = taken_BTR & valid_BT[..., None]
        self._counts = HostCounts(taken_BTR.sum(1).amax(0))

    def choose(self, recursion: int, x_BAD: Tensor, alive: TokenSet) -> Choice:
        rule = self.inputs.rule
        assert isinstance(rule, DepthRule)
        depth_BA = alive.gather(self.depth_BT)
        size = depth_BA.shape[1]
        if self._counts is not None and recursion:
            size = self._counts.places(recursion, size, is_training=self.router.training)
        chosen = rule.choose(recursion, depth_BA, alive.valid_BK, self.inputs.num_tokens, size)
        gate_BK = alive.compose(chosen).gather(self.gate_BT)
        if recursion > 0:
            return Choice(chosen=chosen, gate_BK=gate_BK)
        scores = Scores(logits_BA=self.logits_BTR, decisive_BA=self.logits_BTR, gate_BA=self.gate_BT)
        return Choice(chosen=chosen, gate_BK=gate_BK, scores=scores)

    def merge(self, recursion: int, stream_BTD: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        weight_BK = visit.gate_BK if self.router.config.gating == "weighted" else torch.ones_like(visit.gate_BK)
        finished_BK = visit.active.gather(self.depth_BT) == recursion
        weight_BK = torch.where(finished_BK, weight_BK, torch.zeros_like(weight_BK))
        delta_BKD = visit.y_BKD * weight_BK[..., None].to(visit.y_BKD.dtype)
        return visit.active.add(stream_BTD, delta_BKD), visit.y_BKD
