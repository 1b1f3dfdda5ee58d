"""What a model costs, from its configuration alone: parameters, FLOPs, bytes of keys and values, equal budgets.

Everything is summed over the layer applications of the depth plan, so nothing here can disagree with what runs. FLOPs
are those of a forward pass over one sequence, by either of two rules:

- `paper_flops`, the rule behind the published budgets (arXiv 2507.10524, appendix D): for k active of N tokens a layer
  costs 8 d^2 k + 6 d d_ff k + 2 k^2 d; embedding, head and router are left out, grouped queries are ignored;
- `complete_flops`, which counts every matrix product at its real size.

`active` is the number of tokens active at each recursion. By default it comes from the capacities; token-choice is
taken as balanced, as the paper does. Under a `shared` or `hybrid` KV cache the first recursion runs on all tokens
whatever its capacity, because later recursions read its keys and values.

Legend: d hidden size, N tokens of a sequence, k active tokens, R recursions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from .configuration_mor import WITH_CAPACITIES, MorConfig
from .depth_plan import linear_capacities

TRAINING_FACTOR = 3  # a backward pass costs two forward passes

FlopsRule = Callable[[MorConfig, int], float]


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Unique parameters. `unique_non_embedding`: layers and final norm. `embedding`: with the head, once if tied."""

    unique_non_embedding: int
    embedding: int
    router: int

    @property
    def total(self) -> int:
        """All parameters that a checkpoint stores."""
        return self.unique_non_embedding + self.embedding + self.router


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """What one model costs on sequences of `num_tokens` tokens; FLOPs of a forward pass."""

    parameters: ParameterCount
    num_tokens: int
    mean_depth: float
    paper_flops_per_token: float
    flops_per_token: float
    kv_bytes_per_token: float


def cost_report(
    config: MorConfig, num_tokens: int | None = None, *, active: Sequence[int] | None = None, dtype_bytes: int = 2
) -> CostReport:
    """The costs of `config` on sequences of `num_tokens` tokens (default: the longest it is made for)."""
    num_tokens = config.max_position_embeddings if num_tokens is None else num_tokens
    counted = default_active(config, num_tokens) if active is None else active
    return CostReport(
        parameters=count_parameters(config),
        num_tokens=num_tokens,
        mean_depth=sum(counted) / num_tokens,
        paper_flops_per_token=paper_flops(config, num_tokens, active=active) / num_tokens,
        flops_per_token=complete_flops(config, num_tokens, active=counted) / num_tokens,
        kv_bytes_per_token=kv_bytes(config, counted, dtype_bytes, num_tokens=num_tokens) / num_tokens,
    )


def count_parameters(config: MorConfig) -> ParameterCount:
    """Unique parameters: every shared layer once."""
    tables = 1 if config.tie_word_embeddings else 2
    return ParameterCount(
        unique_non_embedding=config.depth_plan.num_unique_layers * _layer_parameters(config) + config.hidden_size,
        embedding=tables * config.vocab_size * config.hidden_size,
        router=sum(_head_weights(config, outputs) for outputs in _score_heads(config)),
    )


def _layer_parameters(config: MorConfig) -> int:
    hidden, query, key, inner = _widths(config)
    weights = hidden * (2 * query + 2 * key + 3 * inner)
    attention_biases = (query + 2 * key + hidden) * config.attention_bias
    return weights + attention_biases + (2 * inner + hidden) * config.mlp_bias + 2 * hidden


def _widths(config: MorConfig) -> tuple[int, int, int, int]:
    """Hidden size, width of the queries, width of the keys, feed-forward size."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size, query, key, config.intermediate_size


def _score_heads(config: MorConfig) -> list[int]:
    """The number of outputs of each score head that the router holds."""
    if config.router == "token_choice":
        return [config.num_recursions]
    if config.router in ("expert_choice", "threshold_choice", "fixed", "gate"):
        return [1] * config.num_recursions * (2 if _has_auxiliary_heads(config) else 1)
    return []


def _has_auxiliary_heads(config: MorConfig) -> bool:
    return config.router == "expert_choice" and config.causal_method == "aux_router"


def _head_weights(config: MorConfig, outputs: int) -> int:
    hidden = config.hidden_size
    if config.router_architecture == "linear":
        return hidden * outputs
    inner = hidden * {"mlp": 2, "wide_mlp": 4}[config.router_architecture]
    return inner * (hidden + outputs)


def active_shares(config: MorConfig) -> tuple[float, ...]:
    """The expected share of tokens that is active at each recursion."""
    if config.router == "token_choice":
        return linear_capacities(config.num_recursions)
    if config.router in WITH_CAPACITIES:
        return tuple(config.capacities or ())
    depths = config.fixed_depths or [config.num_recursions]
    return tuple(sum(depth > r for depth in depths) / len(depths) for r in range(config.num_recursions))


def default_active(config: MorConfig, num_tokens: int) -> tuple[int, ...]:
    """The tokens active at each recursion of a sequence: max(1, int(capacity * N)), or the fixed pattern's count."""
    if config.router == "fixed":
        assert config.fixed_depths is not None
        pattern = config.fixed_depths
        return active_counts((pattern[t % len(pattern)] for t in range(num_tokens)), config.num_recursions)
    return tuple(max(1, int(share * num_tokens)) for share in active_shares(config))


def active_counts(depths: Iterable[int], num_recursions: int) -> tuple[int, ...]:
    """The tokens active at each recursion, counted from every token's depth."""
    depths = list(depths)
    return tuple(sum(depth > r for depth in depths) for r in range(num_recursions))


def _check_active(config: MorConfig, num_tokens: int, active: Sequence[Any]) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    if len(active) != config.num_recursions:
        raise ValueError(f"active={list(active)} needs one count per recursion: {config.num_recursions}")
    bounds = [num_tokens, *active]
    if any(not np.all((count >= 0) & (count <= before)) for before, count in zip(bounds, active)):
        raise ValueError(f"active={list(active)} must not rise and must lie between 0 and num_tokens={num_tokens}")


@dataclass(frozen=True, kw_only=True)
class _Application:
    """One layer application: how many tokens run it, among how many keys, and whether it makes keys of its own."""

    queries: Any
    keys: Any
    writes: bool


def _applications(config: MorConfig, num_tokens: int, active: Sequence[Any]) -> Iterator[_Application]:
    _check_active(config, num_tokens, active)
    plan = config.depth_plan
    for step in plan.steps:
        access = plan.kv_access(step, config.kv_cache)  # type: ignore[arg-type]
        runs_on_all = step.recursion is None or (step.recursion == 0 and config.kv_cache != "recursion")
        queries = num_tokens if runs_on_all else active[step.recursion or 0]
        reads_first = not access.writes or access.fallback_slot is not None
        yield _Application(queries=queries, keys=num_tokens if reads_first else queries, writes=access.writes)


def paper_flops(config: MorConfig, num_tokens: int, *, active: Sequence[float] | None = None) -> float:
    """Forward FLOPs of one sequence by the paper's rule, in which k is the exact fraction of the tokens by default.

    With shared keys and values a layer costs 4 d^2 k + 6 d d_ff k + 2 k N d after the first recursion. For `hybrid`,
    which the paper does not price, its own projections and the reading of all N positions are counted.
    """
    if active is None:
        active = [share * num_tokens for share in active_shares(config)]
    d, inner = config.hidden_size, config.intermediate_size
    flops = 0.0
    for step in _applications(config, num_tokens, active):
        flops += step.queries * ((8 if step.writes else 4) * d**2 + 6 * d * inner + 2 * step.keys * d)
    return flops


@overload
def complete_flops(config: MorConfig, num_tokens: int, *, active: Sequence[np.ndarray]) -> np.ndarray: ...
@overload
def complete_flops(config: MorConfig, num_tokens: int, *, active: Sequence[float] | None = None) -> float: ...
def complete_flops(config: MorConfig, num_tokens: int, *, active: Sequence[Any] | None = None) -> Any:
    """Forward FLOPs of one sequence, two per multiply-add of every matrix product, with logits at every position.

    Arrays in `active` hold the counts of several sequences, whose FLOPs come back as an array.

    Embedding look-ups cost nothing; norms and activations are left out. k queries over their own keys make
    k (k + 1) / 2 pairs; over the first recursion's N keys k (N + 1) / 2, the mean over where the k tokens stand.
    """
    active = default_active(config, num_tokens) if active is None else active
    hidden, query, key, inner = _widths(config)
    flops = 2.0 * hidden * config.vocab_size * num_tokens + _router_flops(config, num_tokens, active)
    for step in _applications(config, num_tokens, active):
        projections = 2 * hidden * (2 * query + 2 * key * step.writes + 3 * inner)
        flops += step.queries * (projections + 4 * query * (step.keys + 1) / 2)
    return flops


def _router_flops(config: MorConfig, num_tokens: int, active: Sequence[Any]) -> Any:
    """Every token still alive before a recursion is scored by that recursion's heads; token-choice scores all once."""
    heads = _score_heads(config)
    alive = [num_tokens, *active[:-1]]
    per_recursion = len(heads) // config.num_recursions if config.router != "token_choice" else 1
    return sum(2.0 * _head_weights(config, outputs) * alive[i // per_recursion] for i, outputs in enumerate(heads))


def training_flops(
    config: MorConfig, num_tokens: float, *, sequence_length: int, rule: FlopsRule = complete_flops
) -> float:
    """FLOPs of training on `num_tokens` tokens: three times the forward pass."""
    return TRAINING_FACTOR * forward_flops(config, num_tokens, sequence_length=sequence_length, rule=rule)


def forward_flops(
    config: MorConfig, num_tokens: float, *, sequence_length: int, rule: FlopsRule = paper_flops
) -> float:
    """Forward FLOPs of `num_tokens` tokens in sequences of `sequence_length`. The paper's budgets are of this kind."""
    return rule(config, sequence_length) * num_tokens / sequence_length


def tokens_for_budget(
    config: MorConfig, budget: float, *, sequence_length: int, rule: FlopsRule = paper_flops
) -> float:
    """The tokens that `budget` forward FLOPs pay for.

    Raises:
        ValueError: a budget that is not positive.
    """
    if not budget > 0:
        raise ValueError(f"budget={budget} must be a positive number of FLOPs")
    return budget / rule(config, sequence_length) * sequence_length


def steps_for_budget(
    config: MorConfig, budget: float, *, tokens_per_step: int, sequence_length: int, rule: FlopsRule = paper_flops
) -> int:
    """The optimizer steps, rounded to the nearest, that `budget` forward FLOPs pay for.

    Raises:
        ValueError: a budget below half a step.
    """
    steps = round(tokens_for_budget(config, budget, sequence_length=sequence_length, rule=rule) / tokens_per_step)
    if steps < 1:
        one = forward_flops(config, tokens_per_step, sequence_length=sequence_length, rule=rule)
        raise ValueError(f"budget={budget:.4g} FLOPs does not pay for one step, which costs {one:.4g}")
    return steps


def match_tokens(
    config: MorConfig, like: MorConfig, num_tokens: float, *, sequence_length: int, rule: FlopsRule = paper_flops
) -> float:
    """The tokens `config` may see for the FLOPs that `like` spends on `num_tokens`."""
    budget = forward_flops(like, num_tokens, sequence_length=sequence_length, rule=rule)
    return tokens_for_budget(config, budget, sequence_length=sequence_length, rule=rule)


def kv_bytes(config: MorConfig, active: Sequence[int], dtype_bytes: int = 2, *, num_tokens: int | None = None) -> int:
    """Bytes of keys and values held after a sequence, unshared layers included.

    Args:
        active: the tokens active at each recursion, for instance `active_counts` of the depths a model reported.
        dtype_bytes: size of one number.
        num_tokens: tokens of the sequence; default active[0], when the first recursion takes every token.

    Raises:
        ValueError: counts that rise, exceed `num_tokens` or are not one per recursion; `num_tokens` left out although
            the first recursion does not take every token.
    """
    if num_tokens is None:
        if active_shares(config)[0] < 1:
            raise ValueError(f"capacities={config.capacities}: the first is below 1, so kv_bytes needs num_tokens")
        num_tokens = active[0]
    _, _, key, _ = _widths(config)
    stored = sum(int(step.queries) for step in _applications(config, num_tokens, active) if step.writes)
    return stored * 2 * key * dtype_bytes


Recompute = Literal["nothing", "recursion", "layer"]


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each device of a run, at the peak of its backward pass.

    `states`: weights, gradients and two moments, in float32. `gathered`: weights brought together, with their gradient
    and its float32 copy on the way to the other ranks; on one device, the copies of the weights that products use.
    `activations`: what forward keeps for backward.
    """

    states: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it; allocators and libraries take a little more."""
        return self.states + self.gathered + self.activations


def _units(config: MorConfig, gathers_block: bool) -> tuple[list[int], int]:
    """Parameters of each unit that is gathered by itself, and of the root and router, which stay in float32."""
    count, plan, layer = count_parameters(config), config.depth_plan, _layer_parameters(config)
    block = [layer * plan.block_size] if plan.num_recursions > 1 and gathers_block else [layer] * plan.block_size
    return block + [layer] * (2 * plan.num_outer), count.embedding + config.hidden_size + count.router


def training_memory(
    config: MorConfig,
    *,
    num_ranks: int = 1,
    rows: int,
    sequence_length: int,
    gathered_bytes: int = 2,
    gathers_block: bool = True,
    recompute: Recompute = "nothing",
) -> TrainingMemory:
    """Memory of training with `rows` rows per device and micro-batch, spread over `num_ranks` devices by FSDP2.

    Activations of a token in a layer, in bfloat16, as the compiled step keeps them: the residual stream twice, queries,
    keys, values, heads' outputs and two feed-forward widths. (Uncompiled: norms and a third width too.) What
    `recompute` names keeps the stream before each, and all of one: `recursion` is what
    `training.gradient_checkpointing` does (each layer, without a router), `layer` is on paper. Logits, which exist a
    chunk at a time, are left out. `gathers_block`: as in `communication_bytes`.
    """
    units, root = _units(config, gathers_block)
    hidden, query, key, inner = _widths(config)
    gathered = 8 * root + max(units) * (2 * gathered_bytes + 4) + sorted([0, *units])[-2] * gathered_bytes
    if num_ranks == 1:
        gathered = gathered_bytes * sum(units) if gathered_bytes < 4 else 0
    per_token = 2 * (2 * hidden + 2 * query + 2 * key + 2 * inner)
    active = default_active(config, sequence_length)
    queries = [step.queries for step in _applications(config, sequence_length, active)]
    kept = per_token * sum(queries)
    if recompute != "nothing":
        run = 1 if config.router == "none" or recompute == "layer" else config.depth_plan.block_size
        kept = 2 * hidden * sum(queries) / run + per_token * run * max(queries)
    return TrainingMemory(
        states=16 * count_parameters(config).total / num_ranks, gathered=gathered, activations=kept * rows
    )


def communication_bytes(
    config: MorConfig,
    *,
    num_ranks: int,
    num_replicas: int = 1,
    micro_batches: int = 1,
    sharded: bool = True,
    gathered_bytes: int = 2,
    gathers_block: bool = True,
    reshard_after_forward: bool = True,
) -> float:
    """Bytes that each rank receives in an optimizer step.

    `sharded` (FSDP2): each unit is gathered for the forward and, if freed in between, for the backward pass, and its
    float32 gradient summed, in each of a rank's `micro_batches`. The shared block is gathered once for all recursions;
    if not `gathers_block`, its layers are gathered one by one in every recursion, as a vanilla model of the same depth
    would have it. With `num_replicas`, weights are spread over `num_ranks` ranks only and there are so many such groups
    (HSDP): each rank's part of the gradient is summed over the groups, once per step. Not `sharded` (DDP): one
    all-reduce of the float32 gradients.
    """
    units, root = _units(config, gathers_block)
    received = (num_ranks - 1) / num_ranks
    if not sharded:
        return 2 * 4 * (sum(units) + root) * received
    applied = sum(units) if gathers_block else config.depth_plan.num_layers * _layer_parameters(config)
    gathers = (2 if reshard_after_forward else 1) * gathered_bytes * applied + 4 * root
    gradients = 4 * (sum(units) + root)
    across = 2 * gradients / num_ranks * (num_replicas - 1) / num_replicas
    return micro_batches * (gathers + gradients) * received + across
