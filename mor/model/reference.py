"""The model's definition, one token and one vector at a time: slow, and written to be read.

Every fast path (batched, gathered, cached, compiled) must equal this oracle. It takes weights from the modules and
choices from the configuration, calls no module, and keeps keys and values in dictionaries of tokens. The one function
it shares with them is the random router's hash, which stands in for that router's weights.

Under the causal rule a token walks alone: first layers, recursions as long as its router says so, last layers, logits.
It meets earlier tokens only in attention. Under `top_k` (arXiv 2507.10524, section 2.1) a recursion's tokens are known
only when the whole sequence has been scored, so the walk is repeated, one recursion deeper each time.

Legend: T tokens, R recursions, D hidden size, F feed-forward size, H query heads, G key/value heads, E head size,
S tokens seen, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from .configuration_mor import WITH_CAPACITIES, MorConfig
from .expert_choice import hashed_uniform
from .modeling_mor import MorForCausalLM

Place = tuple[str, int, int]  # which group of layers, which layer of it, at which recursion
Entries = dict[int, tuple[Tensor, Tensor]]  # token -> its key and value (G, E)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`logits_TV` of every position and `depths_T`, the block applications each token took."""

    logits_TV: Tensor
    depths_T: Tensor


@torch.no_grad()
def reference_forward(
    model: MorForCausalLM,
    input_ids: Sequence[int],
    decision: str = "causal",
    mean_depth: float | None = None,
    attention_positions: Sequence[int] | None = None,
) -> Reference:
    """Logits and depths of one sequence, as in evaluation.

    Args:
        model: read, never called.
        input_ids: T token ids.
        decision: `causal` or `top_k`.
        mean_depth: budget in block applications per token; default the configuration's.
        attention_positions: rotary position of each token; default 0, 1, 2, ...

    Raises:
        ValueError: a decision, budget or rotary type that the model does not have.
    """
    config = model.config
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters={config.rope_parameters}: the reference knows 'default' positions only")
    positions = range(len(input_ids)) if attention_positions is None else attention_positions
    membership, tilt_R = _decisions(model, decision, mean_depth)
    settled = False
    walked: list[tuple[Tensor, int]] = []
    while not settled:
        walk = _Walk(model, positions, membership, tilt_R)
        walked = [walk.token(t, token) for t, token in enumerate(input_ids)]
        settled = membership.settle(len(input_ids))
    logits, depths = zip(*walked, strict=True)
    return Reference(logits_TV=torch.stack(logits), depths_T=torch.tensor(depths))


class _Membership(Protocol):
    """Who takes a recursion."""

    def takes(self, recursion: int, token: int, logit: float, decisive: float) -> bool:
        """Whether an alive token takes it. `logit` is the router's; `decisive` is what the causal rule compares."""
        ...

    def settle(self, num_tokens: int) -> bool:
        """After a walk: whether every answer in it was final. If not, the tokens walk again."""
        ...


@dataclass(frozen=True, kw_only=True)
class _AboveThreshold:
    """The causal rule: the score reaches the recursion's threshold."""

    thresholds: Sequence[float]

    def takes(self, recursion: int, token: int, logit: float, decisive: float) -> bool:
        return decisive >= self.thresholds[recursion]

    def settle(self, num_tokens: int) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class _ByNumber:
    """The fixed rule: token t takes `depths[t mod len(depths)]` recursions."""

    depths: Sequence[int]

    def takes(self, recursion: int, token: int, logit: float, decisive: float) -> bool:
        return recursion < self.depths[token % len(self.depths)]

    def settle(self, num_tokens: int) -> bool:
        return True


@dataclass(kw_only=True)
class _TopK:
    """The k = max(1, int(capacity * T)) best-scored tokens of the whole sequence. Each walk settles one recursion."""

    capacities: Sequence[float]
    members: list[set[int]] = field(default_factory=list)
    scored: dict[int, float] = field(default_factory=dict)

    def takes(self, recursion: int, token: int, logit: float, decisive: float) -> bool:
        if recursion < len(self.members):
            return token in self.members[recursion]
        self.scored[token] = logit
        return False

    def settle(self, num_tokens: int) -> bool:
        if len(self.members) == len(self.capacities):
            return True
        size = max(1, int(self.capacities[len(self.members)] * num_tokens))
        best = sorted(self.scored, key=lambda token: self.scored[token], reverse=True)
        self.members.append(set(best[:size]))
        self.scored = {}
        return False


def _decisions(model: Any, decision: str, mean_depth: float | None) -> tuple[_Membership, Tensor]:
    """Who takes a recursion, where a router asks each time; and what is added to token-choice's scores (R,)."""
    config: MorConfig = model.config
    budgeted = config.router in (*WITH_CAPACITIES, "token_choice")
    if mean_depth is not None and not budgeted:
        raise ValueError(f"mean_depth={mean_depth}: router={config.router!r} has no budget to set")
    no_tilt = torch.zeros(config.num_recursions)
    if decision == "top_k" and config.router in WITH_CAPACITIES:
        return _TopK(capacities=_budget_capacities(config, mean_depth)), no_tilt
    if decision != "causal":
        raise ValueError(f"decision={decision!r} does not exist for router={config.router!r}")
    if config.router in ("fixed", "gate"):
        return _ByNumber(depths=list(config.fixed_depths or ())), no_tilt
    mean_depth = config.mean_depth if mean_depth is None else mean_depth
    stored = None if mean_depth is None or not budgeted else _calibrated(model, mean_depth)
    if config.router == "token_choice":
        return _AboveThreshold(thresholds=()), no_tilt if stored is None else torch.tensor(stored)
    return _AboveThreshold(thresholds=stored or _default_thresholds(model)), no_tilt


def _default_thresholds(model: Any) -> list[float]:
    """0.5 after the sigmoid (0 after tanh) is a logit of 0; uniform scores are cut so that shares are kept; what
    threshold-choice was trained with is stored."""
    config: MorConfig = model.config
    capacities = [float(c) for c in config.capacities or ()]
    if config.router == "random":
        before = [1.0, *capacities]
        return [1 - now / last if now < last else -math.inf for last, now in zip(before, capacities)]
    if config.router == "threshold_choice":
        stored = model.model.recursion.router.running_thresholds.tolist()
        return [-math.inf if capacity >= 1 else threshold for capacity, threshold in zip(capacities, stored)]
    is_logit = config.router_activation != "identity" or config.causal_method == "aux_router"
    return [-math.inf if capacity >= 1 else (0.0 if is_logit else 0.5) for capacity in capacities]


def _budget_capacities(config: MorConfig, mean_depth: float | None) -> list[float]:
    """Capacities that sum to `mean_depth`, between (1, 0, ..), the trained ones and (1, .., 1)."""
    trained = [float(c) for c in config.capacities or ()]
    if mean_depth is None:
        return trained
    low: list[float] = trained
    high: list[float] = [1.0] * len(trained)
    if mean_depth <= sum(trained):
        low, high = [1.0, *[0.0] * (len(trained) - 1)], trained
    weight = (mean_depth - sum(low)) / (sum(high) - sum(low)) if sum(high) > sum(low) else 1.0
    return [a + weight * (b - a) for a, b in zip(low, high, strict=True)]


def _calibrated(model: Any, mean_depth: float) -> list[float]:
    """The thresholds stored for `mean_depth`, on the straight line between the two nearest stored depths.

    An infinite end ("everybody", "nobody") holds until the next stored depth. Depths 1 and R need no measurement.
    """
    router, num_recursions = model.model.recursion.router, model.config.num_recursions
    depths, table = router.calibration_mean_depth.tolist(), router.calibration_thresholds.tolist()
    if not depths[0] <= mean_depth <= depths[-1]:
        raise ValueError(f"mean_depth={mean_depth} is not within the calibrated {depths[0]} to {depths[-1]}")
    if mean_depth in (1, num_recursions):
        last = int(mean_depth) - 1
        if model.config.router == "token_choice":
            return [0.0 if r == last else -math.inf for r in range(num_recursions)]
        return [-math.inf if r <= last else math.inf for r in range(num_recursions)]
    right = next(i for i in range(1, len(depths)) if depths[i] >= mean_depth)
    weight = (mean_depth - depths[right - 1]) / max(depths[right] - depths[right - 1], 1e-9)
    ends = zip(table[right - 1], table[right], strict=True)
    return [_between(low, high, weight) for low, high in ends]


def _between(low: float, high: float, weight: float) -> float:
    if weight == 1:
        return high
    return low if math.isinf(low) or math.isinf(high) else low + weight * (high - low)


class _Walk:
    """One pass over the tokens of a sequence, in order, with the keys and values that it leaves behind."""

    def __init__(self, model: Any, positions: Sequence[int], membership: _Membership, tilt_R: Tensor) -> None:
        self.model, self.positions, self.membership, self.tilt_R = model, positions, membership, tilt_R
        self.config: Any = model.config
        self.block_layers, self.router = model.model.recursion.block, model.model.recursion.router
        self.memory: dict[Place, Entries] = defaultdict(dict)

    def token(self, t: int, token: int) -> tuple[Tensor, int]:
        """Logits (V,) after token t, and its depth."""
        body = self.model.model
        x_D = body.embed_tokens.weight[token]
        for i, layer in enumerate(body.first_layers):
            x_D = self.layer(layer, ("first", i, 0), t, x_D)
        x_D, depth = self.recursions(t, x_D)
        for i, layer in enumerate(body.last_layers):
            x_D = self.layer(layer, ("last", i, 0), t, x_D)
        return _linear(self.model.lm_head, self.norm(body.norm, x_D)), depth

    def recursions(self, t: int, x_D: Tensor) -> tuple[Tensor, int]:
        """The residual stream after the recursions, and how many were taken."""
        if self.config.router == "none":
            return self.every_recursion(t, x_D), self.config.num_recursions
        if self.config.router == "token_choice":
            return self.chosen_once(t, x_D)
        return self.asked_each_time(t, x_D)

    def every_recursion(self, t: int, x_D: Tensor) -> Tensor:
        """No router: AB AB for the cycle sharings, AA BB for the sequence sharings."""
        layers, recursions = range(len(self.block_layers)), range(self.config.num_recursions)
        order = [(j, r) for r in recursions for j in layers]
        if self.config.sharing.endswith("sequence"):
            order = [(j, r) for j in layers for r in recursions]
        for j, r in order:
            x_D = self.layer(self.block_layers[j], ("block", j, r), t, x_D)
        return x_D

    def asked_each_time(self, t: int, x_D: Tensor) -> tuple[Tensor, int]:
        """x <- x + gate * block(x) until a recursion is not taken; who stopped is not asked again.

        Shared and hybrid caches need every token's keys of the first recursion, so the block runs there all the same.
        """
        for recursion in range(self.config.num_recursions):
            logit, decisive = self.scores(recursion, t, x_D)
            if not self.membership.takes(recursion, t, float(logit), float(decisive)):
                if recursion == 0 and self.config.kv_cache != "recursion":
                    self.block(recursion, t, x_D)
                return x_D, recursion
            gate = self.gate(logit) if self.config.gating == "weighted" else 1.0
            x_D = x_D + gate * self.block(recursion, t, x_D)
        return x_D, self.config.num_recursions

    def chosen_once(self, t: int, x_D: Tensor) -> tuple[Tensor, int]:
        """Token-choice: h <- block(h) as often as the argmax says, then x + gate * h. Biases move the argmax alone."""
        logits_R = _scores(self.router.head, x_D / self.config.router_temperature)
        activated_R = logits_R.sigmoid() if self.config.router_activation == "sigmoid" else logits_R.softmax(dim=-1)
        score_R = self.config.router_alpha * activated_R
        load_bias_R = self.router.load_bias if self.config.balancing == "loss_free" else 0.0
        depth = int((score_R + load_bias_R + self.tilt_R).argmax()) + 1
        h_D = x_D
        for recursion in range(depth):
            h_D = self.block(recursion, t, h_D)
        gate = score_R[depth - 1] if self.config.gating == "weighted" else 1.0
        return x_D + gate * h_D, depth

    def scores(self, recursion: int, t: int, x_D: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logit at a recursion, and the number that the causal rule compares."""
        if self.config.router == "random":
            score = hashed_uniform(torch.tensor(t), recursion, self.config.router_seed)
            return score, score
        logit = _scores(self.router.heads[recursion], x_D / self.config.router_temperature)[0]
        if self.config.router == "expert_choice" and self.config.causal_method == "aux_router":
            return logit, _scores(self.router.auxiliary_heads[recursion], x_D)[0]
        return logit, logit

    def gate(self, logit: Tensor) -> Tensor:
        """alpha * sigmoid or tanh of the logit, alpha * score of the random router; identity has no alpha."""
        if self.config.router == "random":
            return self.config.router_alpha * logit
        if self.config.router_activation == "identity":
            return logit
        return self.config.router_alpha * (logit.tanh() if self.config.router_activation == "tanh" else logit.sigmoid())

    def block(self, recursion: int, t: int, x_D: Tensor) -> Tensor:
        """The block's output at a recursion, its own residual stream included."""
        for j, layer in enumerate(self.block_layers):
            x_D = self.layer(layer, ("block", j, recursion), t, x_D)
        return x_D

    def layer(self, layer: Any, place: Place, t: int, x_D: Tensor) -> Tensor:
        """x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x)))."""
        x_D = x_D + self.attention(layer.self_attn, place, t, self.norm(layer.input_layernorm, x_D))
        z_D = self.norm(layer.post_attention_layernorm, x_D)
        inner_F = ACT2FN[self.config.hidden_act](_linear(layer.mlp.gate_proj, z_D)) * _linear(layer.mlp.up_proj, z_D)
        return x_D + _linear(layer.mlp.down_proj, inner_F)

    def norm(self, norm: Any, x_D: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight."""
        return x_D * torch.rsqrt(x_D.square().mean() + self.config.rms_norm_eps) * norm.weight

    def attention(self, attention: Any, place: Place, t: int, x_D: Tensor) -> Tensor:
        """Softmax attention of token t over what it may see; query head h reads key/value head h // (H / G)."""
        if place[2] == 0 or self.config.kv_cache != "shared":
            key_GE = self.rotate(t, self.heads(attention.k_proj, x_D))
            self.memory[place][t] = key_GE, self.heads(attention.v_proj, x_D)
        seen = self.seen(place)
        keys_SGE = torch.stack([key for key, _ in seen.values()])
        values_SGE = torch.stack([value for _, value in seen.values()])
        query_HE = self.rotate(t, self.heads(attention.q_proj, x_D))
        queries_per_key = query_HE.shape[0] // keys_SGE.shape[1]
        out = []
        for h, query_E in enumerate(query_HE):
            g = h // queries_per_key
            weight_S = (keys_SGE[:, g] @ query_E / math.sqrt(query_E.numel())).softmax(dim=0)
            out.append(weight_S @ values_SGE[:, g])
        return _linear(attention.o_proj, torch.cat(out))

    def seen(self, place: Place) -> Entries:
        """The tokens so far whose keys and values can be read at a place: later ones have not walked yet.

        `recursion`: those active here. `shared`: the first recursion's. `hybrid`: the first's, own ones in their stead.
        """
        group, index, recursion = place
        own, first = self.memory[place], self.memory[group, index, 0]
        if recursion == 0 or self.config.kv_cache == "recursion":
            return own
        return first if self.config.kv_cache == "shared" else {**first, **own}

    def heads(self, projection: Any, x_D: Tensor) -> Tensor:
        return _linear(projection, x_D).view(-1, self.config.head_dim)

    def rotate(self, t: int, x_HE: Tensor) -> Tensor:
        """Rotary position (arXiv 2104.09864): turn the pair (i, i + E/2) by position * theta^(-2i/E)."""
        first, second = x_HE.chunk(2, dim=-1)
        size = x_HE.shape[-1]
        angle = self.positions[t] * self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _linear(linear: Any, x: Tensor) -> Tensor:
    y = linear.weight @ x
    return y if linear.bias is None else y + linear.bias


def _scores(head: Any, x_D: Tensor) -> Tensor:
    """A router's scores: one linear map, or two with an exact GELU between; in float32."""
    x = head[0].weight.float() @ x_D.float()
    return x if len(head) == 1 else head[2].weight.float() @ torch.nn.functional.gelu(x)
