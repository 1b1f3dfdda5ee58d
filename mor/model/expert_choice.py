"""Routers that decide before each recursion: expert-choice, and the controls built like it.

Legend: B rows, A tokens alive before a recursion, D hidden size, R recursions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .configuration_mor import MorConfig
from .decision import DecisionRule, Threshold, TopK
from .router_losses import membership_loss, z_loss
from .routing import RecursionRouter, ScoreHead, Scores
from .token_set import TokenSet, on_device

_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


class ExpertChoiceRouter(RecursionRouter):
    """One score head per recursion; training lets each recursion pick its top-k tokens (arXiv 2507.10524, 2.1).

    The causal rule reads the same logits, or those of the auxiliary router, against a threshold: 0.5 after the sigmoid,
    which is what the auxiliary losses train towards. A recursion of capacity 1 takes everything.
    """

    decisions = ("causal", "top_k")

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(ScoreHead(config, 1) for _ in range(config.num_recursions))
        self.auxiliary_heads: nn.ModuleList | None = None
        if config.causal_method == "aux_router":
            self.auxiliary_heads = nn.ModuleList(ScoreHead(config, 1) for _ in range(config.num_recursions))

    @property
    def trained_shares(self) -> list[float]:
        assert self.config.capacities is not None
        return list(self.config.capacities)

    def default_rule(self) -> DecisionRule:
        boundary = 0.5 if self.config.router_activation == "identity" and self.auxiliary_heads is None else 0.0
        thresholds = [-math.inf if capacity >= 1 else boundary for capacity in self.trained_shares]
        return Threshold(thresholds=torch.tensor(thresholds, device=self.training_forwards.device))

    def trained_rule(self) -> DecisionRule:
        """Top-k at the capacities of this training forward, which fall along a cosine during warm-up."""
        return TopK(capacities=self.warm_capacities(self.count_forward()))

    @property
    def warmup_forwards(self) -> int:
        return self.config.capacity_warmup_steps

    def warm_capacities(self, forwards: int) -> list[float]:
        """c + (1 - c) (1 + cos(pi min(1, t / W))) / 2 at training forward t = `forwards`, W the warm-up."""
        steps = self.config.capacity_warmup_steps
        if steps == 0:
            return self.trained_shares
        excess = 0.5 * (1 + math.cos(math.pi * min(1.0, forwards / steps)))
        return [c + (1 - c) * excess for c in self.trained_shares]

    def read(self, recursion: int, x_BAD: Tensor) -> tuple[Tensor, ...]:
        logits_BA = self.heads[recursion](self._tempered(x_BAD)).squeeze(-1)
        if self.auxiliary_heads is None:
            return (logits_BA,)
        return logits_BA, self.auxiliary_heads[recursion](x_BAD.detach()).squeeze(-1)

    def score(self, recursion: int, read: tuple[Tensor, ...], number_BA: Tensor) -> Scores:
        return Scores(logits_BA=read[0], decisive_BA=read[-1], gate_BA=self.gate(read[0]))

    def losses(self, scores: Scores, kept_BA: Tensor, valid_BA: Tensor | None) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.auxiliary_heads is not None:
            losses["aux_router"] = membership_loss(scores.decisive_BA, kept_BA, valid_BA)
        elif self.config.causal_method == "aux_loss":
            losses["sampling"] = membership_loss(scores.logits_BA, kept_BA, valid_BA)
        if self.config.router_z_loss_coef:
            losses["router_z"] = z_loss(scores.logits_BA[..., None], valid_BA)
        return losses


class RandomRouter(RecursionRouter):
    """Control: expert-choice on uniform scores, gate = alpha * score. Nothing is learnt.

    Training draws new scores each forward; otherwise a token's score is a hash of its number in the row, the recursion
    and `router_seed`, so that decoding repeats the full forward.
    """

    decisions = ("causal", "top_k")

    @property
    def trained_shares(self) -> list[float]:
        assert self.config.capacities is not None
        return list(self.config.capacities)

    def default_rule(self) -> DecisionRule:
        shares = [1.0, *self.trained_shares]
        thresholds = [1 - now / before if now < before else -math.inf for before, now in pairwise(shares)]
        return Threshold(thresholds=torch.tensor(thresholds, device=self.training_forwards.device))

    def trained_rule(self) -> DecisionRule:
        return TopK(capacities=self.trained_shares)

    def read(self, recursion: int, x_BAD: Tensor) -> tuple[Tensor, ...]:
        return ()

    def score(self, recursion: int, read: tuple[Tensor, ...], number_BA: Tensor) -> Scores:
        if self.training:
            score_BA = torch.rand(number_BA.shape, device=number_BA.device)
        else:
            score_BA = hashed_uniform(number_BA, recursion, self.config.router_seed)
        return Scores(logits_BA=score_BA, decisive_BA=score_BA, gate_BA=self.alpha * score_BA)


class FixedRouter(RecursionRouter):
    """Controls `fixed` and `gate`: the depth depends on the token's number alone, the gate is learnt as in
    expert-choice.

    With one fixed depth R (`gate`) every token takes every recursion: the gated residual without routing.
    """

    can_budget = False

    def __init__(self, config: MorConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(ScoreHead(config, 1) for _ in range(config.num_recursions))

    def default_rule(self) -> DecisionRule:
        assert self.config.fixed_depths is not None
        return FixedDepths(depths=self.config.fixed_depths)

    def trained_rule(self) -> DecisionRule:
        assert self.config.fixed_depths is not None
        return FixedDepths(depths=self.config.fixed_depths, from_start=True)

    def read(self, recursion: int, x_BAD: Tensor) -> tuple[Tensor, ...]:
        return (self.heads[recursion](self._tempered(x_BAD)).squeeze(-1),)

    def score(self, recursion: int, read: tuple[Tensor, ...], number_BA: Tensor) -> Scores:
        return Scores(logits_BA=read[0], decisive_BA=number_BA, gate_BA=self.gate(read[0]))


class FixedDepths:
    """Rule of the fixed router: the token numbered n takes `depths[n mod len(depths)]` recursions.

    `from_start`: every row begins with its token 0, nothing is cached; sizes are then known without reading numbers.
    """

    is_causal = True

    def __init__(self, *, depths: Sequence[int], from_start: bool = False) -> None:
        self.depths, self._from_start = depths, from_start

    def choose(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None, num_tokens: Tensor | int) -> TokenSet:
        """`score_BA`: the tokens' numbers."""
        if valid_BA is None and min(self.depths) > recursion:
            return TokenSet()
        keep_BA = on_device(self.depths, score_BA.device)[score_BA % len(self.depths)] > recursion
        if valid_BA is not None:
            return TokenSet.from_mask(keep_BA & valid_BA)
        if not self._from_start or isinstance(num_tokens, Tensor):
            return TokenSet.from_mask(keep_BA)
        return TokenSet.from_even_mask(keep_BA, self._count(recursion, num_tokens))

    def _count(self, recursion: int, num_tokens: int) -> int:
        """How many of the tokens 0..num_tokens - 1 take a recursion."""
        takes = [depth > recursion for depth in self.depths]
        rounds, rest = divmod(num_tokens, len(takes))
        return rounds * sum(takes) + sum(takes[:rest])


def hashed_uniform(number_BA: Tensor, recursion: int, seed: int) -> Tensor:
    """Scores in [0, 1), a fixed pseudo-random function of token number, recursion and seed (64-bit multiply and
    shift).
    """
    offset = ((recursion + 1) * _MIX[1] + seed * _MIX[2] + (1 << 63)) % (1 << 64) - (1 << 63)
    hashed = (number_BA.long() + 1) * _MIX[0] + offset
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        hashed = (hashed ^ ((hashed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((hashed >> 40) & 0xFFFFFF).float() / (1 << 24)
