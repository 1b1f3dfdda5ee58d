"""The cost model against the paper's own numbers, against the real model, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.model.configuration_mor import MorConfig
from mor.model.cost import (
    active_counts,
    communication_bytes,
    complete_flops,
    cost_report,
    count_parameters,
    default_active,
    forward_flops,
    kv_bytes,
    match_tokens,
    paper_flops,
    steps_for_budget,
    tokens_for_budget,
    training_flops,
    training_memory,
)
from mor.model.modeling_mor import MorForCausalLM

LENGTH = 2048
STEP = 1024 * LENGTH  # tokens per optimizer step in every published run

# Table 6: hidden size, feed-forward size, layers, heads, KV heads; the last column is the depth of the Nr=3 models.
BASES: dict[str, tuple[int, int, int, int, int, int]] = {
    "135M": (576, 1536, 30, 9, 3, 32),
    "360M": (960, 2560, 32, 15, 5, 32),
    "730M": (1536, 4096, 26, 24, 8, 26),
    "1.7B": (2048, 8192, 24, 32, 32, 26),
}


def base_config(base: str, num_recursions: int = 1, **choices: Any) -> MorConfig:
    hidden, inner, layers, heads, kv_heads, layers_of_three = BASES[base]
    if num_recursions == 3:
        layers = layers_of_three
    return MorConfig(
        **{
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_recursions": num_recursions,
            "sharing": "middle_cycle" if num_recursions > 1 else "none",
            **choices,
        }
    )


def mor_360m(num_recursions: int, **choices: Any) -> MorConfig:
    choices.setdefault("router", "expert_choice")
    return base_config("360M", num_recursions, num_hidden_layers=34 if num_recursions == 4 else 32, **choices)


VANILLA = base_config("360M")
BUDGET = forward_flops(VANILLA, 9438 * STEP, sequence_length=LENGTH)


@pytest.mark.parametrize(
    ("base", "budget", "vanilla", "recursive", "mor"),
    [
        ("135M", 2e18, 6.5, 6.1, 9.2),
        ("135M", 5e18, 16.1, 15.1, 23.1),
        ("135M", 16.5e18, 53.3, 50.0, 76.2),
        ("360M", 2e18, 2.4, 2.4, 3.6),
        ("360M", 5e18, 6.0, 6.0, 9.0),
        ("360M", 16.5e18, 19.8, 19.8, 29.7),
        ("730M", 2e18, 1.2, 1.2, 1.8),
        ("730M", 5e18, 3.1, 3.1, 4.5),
        ("730M", 16.5e18, 10.1, 10.1, 14.9),
        ("1.7B", 2e18, 0.6, 0.5, 0.8),
        ("1.7B", 5e18, 1.5, 1.3, 2.0),
        ("1.7B", 16.5e18, 4.8, 4.5, 6.5),
    ],
)
def test_token_counts_of_table_9(base: str, budget: float, vanilla: float, recursive: float, mor: float) -> None:
    configs = base_config(base), base_config(base, 3), base_config(base, 3, router="expert_choice")
    billions = [round(tokens_for_budget(c, budget, sequence_length=LENGTH) / 1e9, 1) for c in configs]
    assert billions == [vanilla, recursive, mor]


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (VANILLA, 9438),
        (mor_360m(2, router="none"), 9438),
        (mor_360m(3, router="none"), 9438),
        (mor_360m(4, router="none"), 8883),
        (mor_360m(2), 12619),
        (mor_360m(3), 14160),  # the released configuration says 14161
        (mor_360m(3, router="token_choice"), 14160),
        (mor_360m(4), 14216),
        (mor_360m(3, kv_cache="shared"), 14672),
    ],
)
def test_step_counts_of_the_released_configurations(config: MorConfig, steps: int) -> None:
    assert steps_for_budget(config, BUDGET, tokens_per_step=STEP, sequence_length=LENGTH) == steps


def test_vanilla_budget() -> None:
    assert pytest.approx(16.5e18, rel=2e-5) == BUDGET


@pytest.mark.parametrize(
    ("config", "relative"),
    [
        (mor_360m(2), 0.748),
        (mor_360m(3), 0.6665),
        (mor_360m(4), 0.664),
        (mor_360m(3, kv_cache="shared"), 0.643),
        (mor_360m(4, router="none"), 1.0625),
    ],
)
def test_relative_flops_per_token(config: MorConfig, relative: float) -> None:
    assert paper_flops(config, LENGTH) / paper_flops(VANILLA, LENGTH) == pytest.approx(relative, abs=5e-4)


@pytest.mark.parametrize(("num_recursions", "exaflops"), [(2, 12.34), (3, 11.00), (4, 10.95)])
def test_budgets_at_equal_tokens(num_recursions: int, exaflops: float) -> None:
    flops = forward_flops(mor_360m(num_recursions), 9438 * STEP, sequence_length=LENGTH)
    assert round(flops / 1e18, 2) == exaflops


@pytest.mark.parametrize(
    ("config", "layers_in_millions", "total"),
    [
        (VANILLA, 314.6, 361_821_120),
        (mor_360m(2), 167.1, 214_338_240),
        (mor_360m(3), 118.0, 165_177_600),
        (mor_360m(4), 98.3, 145_513_920),
        (mor_360m(3, router="token_choice"), 118.0, 165_177_600),
    ],
)
def test_parameters_of_the_360m_models(config: MorConfig, layers_in_millions: float, total: int) -> None:
    count = count_parameters(config)
    assert round((count.unique_non_embedding - config.hidden_size) / 1e6, 1) == layers_in_millions  # no final norm
    assert count.total == total


@pytest.mark.parametrize(
    ("base", "layers_in_millions", "embedding_in_millions"),
    [("135M", 106, 28), ("360M", 315, 47), ("730M", 654, 75), ("1.7B", 1611, 101)],
)
def test_parameters_of_table_6(base: str, layers_in_millions: int, embedding_in_millions: int) -> None:
    count = count_parameters(base_config(base))
    assert round(count.unique_non_embedding / 1e6) == layers_in_millions
    assert round(count.embedding / 1e6) == embedding_in_millions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VANILLA, 40_960),
        (mor_360m(2), 31_360),
        (mor_360m(3), 28_160),
        (mor_360m(4), 28_160),
        (mor_360m(4, router="none"), 43_520),
        (mor_360m(3, kv_cache="shared"), 15_360),
        (mor_360m(3, kv_cache="hybrid"), 28_160),
    ],
)
def test_kv_bytes_per_token(config: MorConfig, expected: int) -> None:
    num_tokens = 1200  # divisible by 2, 3 and 4: no rounding of capacities
    assert kv_bytes(config, default_active(config, num_tokens)) == expected * num_tokens
    assert cost_report(config, num_tokens).kv_bytes_per_token == expected


def small_config(**choices: Any) -> MorConfig:
    defaults: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    return MorConfig(**{**defaults, **choices})


@pytest.mark.parametrize("policy", ["shared", "hybrid"])
def test_first_recursion_runs_on_all_tokens_where_later_ones_read_it(policy: str) -> None:
    choices = {"num_recursions": 2, "sharing": "middle_cycle", "router": "expert_choice", "kv_cache": policy}
    config = small_config(capacities=[0.5, 0.25], **choices)
    full = small_config(capacities=[1.0, 0.25], **choices)
    for rule in (paper_flops, complete_flops):
        difference = rule(full, 16) - rule(config, 16)
        assert difference == (0 if rule is paper_flops else 2 * 12 * 8)  # fewer tokens left for the second head
    assert kv_bytes(config, [8, 4], num_tokens=16) == kv_bytes(full, [16, 4])
    with pytest.raises(ValueError, match="needs num_tokens"):
        kv_bytes(config, [8, 4])


def test_recursion_wise_keys_count_where_tokens_were_active() -> None:
    config = small_config(num_recursions=2, sharing="middle_cycle", router="expert_choice", capacities=[0.5, 0.25])
    per_token = 2 * 4 * 2
    assert kv_bytes(config, [8, 3], num_tokens=16) == (2 * 16 + 3 * (8 + 3)) * per_token


def test_complete_flops_of_one_layer_by_hand() -> None:
    config = small_config(num_hidden_layers=1)
    tokens, hidden, query, key, inner, vocabulary = 5, 12, 8, 4, 20, 50
    linear = 2 * tokens * (2 * hidden * query + 2 * hidden * key + 3 * hidden * inner + hidden * vocabulary)
    attention = sum(4 * query * (position + 1) for position in range(tokens))
    assert complete_flops(config, tokens) == linear + attention
    assert training_flops(config, tokens, sequence_length=tokens) == 3 * (linear + attention)


@pytest.mark.parametrize("architecture", ["linear", "mlp", "wide_mlp"])
def test_complete_flops_of_the_router(architecture: str) -> None:
    choices = {"num_recursions": 2, "sharing": "cycle", "router_architecture": architecture}
    plain = complete_flops(small_config(num_recursions=2, sharing="cycle"), 6)
    routed = complete_flops(small_config(router="token_choice", **choices), 6, active=[6, 6])
    inner = {"linear": 0, "mlp": 24, "wide_mlp": 48}[architecture]
    assert routed - plain == 2 * 6 * (inner * (12 + 2) if inner else 12 * 2)


def test_fixed_router_counts_its_pattern() -> None:
    config = small_config(num_recursions=3, num_hidden_layers=6, sharing="cycle", router="fixed", fixed_depths=[1, 3])
    assert default_active(config, 7) == (7, 3, 3)


def test_active_counts() -> None:
    assert active_counts([1, 3, 0, 2], 3) == (3, 2, 1)


def test_report_holds_the_three_columns_of_a_comparison() -> None:
    report = cost_report(mor_360m(3), 1200)
    assert report.mean_depth == 2.0
    assert report.paper_flops_per_token == paper_flops(mor_360m(3), 1200) / 1200
    assert report.flops_per_token == complete_flops(mor_360m(3), 1200) / 1200
    assert asdict(report)["parameters"]["router"] == 3 * 960


def test_matched_tokens_cost_the_same() -> None:
    tokens = match_tokens(mor_360m(2), VANILLA, 20e9, sequence_length=LENGTH)
    assert tokens / 20e9 == pytest.approx(1 / 0.748, rel=1e-3)
    assert forward_flops(mor_360m(2), tokens, sequence_length=LENGTH) == pytest.approx(
        forward_flops(VANILLA, 20e9, sequence_length=LENGTH)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kv_bytes(mor_360m(2), [4]), "one count per recursion: 2"),
        (lambda: kv_bytes(mor_360m(2), [4, 5]), "must not rise"),
        (lambda: paper_flops(mor_360m(2), 4, active=[5, 1]), "between 0 and num_tokens=4"),
        (lambda: paper_flops(VANILLA, 0), "num_tokens=0"),
        (lambda: tokens_for_budget(VANILLA, 0, sequence_length=8), "budget=0"),
        (lambda: steps_for_budget(VANILLA, 1e9, tokens_per_step=STEP, sequence_length=LENGTH), "one step"),
    ],
)
def test_impossible_requests_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


SHARED_PLANS = [
    ("middle_cycle", "expert_choice"),
    ("cycle", "token_choice"),
    ("middle_cycle", "random"),
    ("cycle", "gate"),
    ("sequence", "none"),
    ("middle_sequence", "none"),
]


@given(
    plan=st.sampled_from(SHARED_PLANS),
    policy=st.sampled_from(["recursion", "shared", "hybrid"]),
    num_recursions=st.integers(1, 4),
    block_size=st.integers(1, 3),
    num_tokens=st.integers(1, 64),
    data=st.data(),
)
def test_costs_are_consistent(
    plan: tuple[str, str], policy: str, num_recursions: int, block_size: int, num_tokens: int, data: st.DataObject
) -> None:
    sharing, router = plan
    outer = 2 if sharing.startswith("middle_") else 0
    layers = num_recursions * block_size + outer
    choices = {"num_hidden_layers": layers, "num_recursions": num_recursions, "sharing": sharing, "router": router}
    config = small_config(kv_cache=policy, **choices)
    rest = st.lists(st.integers(0, num_tokens), min_size=num_recursions - 1, max_size=num_recursions - 1)
    active = [num_tokens, *sorted(data.draw(rest), reverse=True)]
    all_active = [num_tokens] * num_recursions

    assert kv_bytes(config, active) <= kv_bytes(config, all_active) <= kv_bytes(small_config(**choices), all_active)
    vanilla = small_config(num_hidden_layers=layers)
    assert kv_bytes(vanilla, [num_tokens]) == kv_bytes(small_config(**choices), all_active)
    assert paper_flops(small_config(**choices), num_tokens, active=all_active) == paper_flops(vanilla, num_tokens)
    for rule in (paper_flops, complete_flops):
        assert 0 < rule(config, num_tokens, active=active) <= rule(config, num_tokens, active=all_active)
    assert (
        count_parameters(config).unique_non_embedding
        == (block_size + outer) * (count_parameters(small_config(num_hidden_layers=1)).unique_non_embedding - 12) + 12
    )


def routed(router: str, **choices: Any) -> dict[str, Any]:
    return {"num_recursions": 3, "sharing": "middle_cycle", "router": router, **choices}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        *({"num_recursions": 2, "sharing": s} for s in ("cycle", "sequence", "middle_cycle", "middle_sequence")),
        *(routed("expert_choice", router_architecture=a) for a in ("linear", "mlp", "wide_mlp")),
        routed("expert_choice", causal_method="aux_router", router_architecture="mlp"),
        routed("expert_choice", kv_cache="shared"),
        routed("threshold_choice", router_architecture="mlp"),
        routed("token_choice"),
        routed("token_choice", router_architecture="mlp", balancing="loss_free"),
        routed("random"),
        routed("fixed", fixed_depths=[1, 2, 3]),
        routed("gate"),
    ],
)
def test_parameters_are_those_of_the_model(choices: dict[str, Any], tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied, **choices)
    model = MorForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


def test_a_shared_block_is_communicated_once_however_often_it_runs():
    """Three recursions of ten layers cost the network what ten layers do, and the devices what thirty do."""
    deep = MorConfig(num_hidden_layers=32, num_recursions=3, sharing="middle_cycle")
    shallow = MorConfig(num_hidden_layers=12, num_recursions=1, sharing="middle_cycle")
    arguments = {"num_ranks": 8, "gathered_bytes": 2}
    assert communication_bytes(deep, **arguments) == communication_bytes(shallow, **arguments)
    assert complete_flops(deep, 2048) > 2 * complete_flops(shallow, 2048)
    vanilla = MorConfig(num_hidden_layers=32)
    layerwise = communication_bytes(deep, gathers_block=False, **arguments)
    assert communication_bytes(deep, **arguments) < layerwise < communication_bytes(vanilla, **arguments)


def test_communication_by_hand():
    config = MorConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=100)
    count = count_parameters(config).total
    layers = count - 100 * 64 - 64
    assert communication_bytes(config, num_ranks=1) == 0
    assert communication_bytes(config, num_ranks=4, sharded=False) == pytest.approx(2 * 4 * count * 3 / 4)
    sharded = (2 * 2 * layers + 4 * (100 * 64 + 64) + 4 * count) * 3 / 4
    assert communication_bytes(config, num_ranks=4) == pytest.approx(sharded)
    assert communication_bytes(config, num_ranks=4, micro_batches=3) == pytest.approx(3 * sharded)
    kept = communication_bytes(config, num_ranks=4, reshard_after_forward=False)
    assert sharded - kept == pytest.approx(2 * layers * 3 / 4)
    two_groups = communication_bytes(config, num_ranks=4, num_replicas=2)
    assert two_groups - sharded == pytest.approx(2 * 4 * count / 4 / 2)


def test_memory_by_hand():
    config = MorConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=100)
    count, arguments = count_parameters(config).total, {"rows": 3, "sequence_length": 10}
    root = 100 * 64 + 64
    layer = (count - root) // 2
    one, four = (training_memory(config, num_ranks=size, **arguments) for size in (1, 4))
    streams, inside = 2 * 64, 4 * 64 + 2 * 96
    assert one.activations == four.activations == 2 * (streams + inside) * 2 * 10 * 3
    assert (one.states, four.states) == (16 * count, 4 * count)
    assert (one.gathered, four.gathered) == (2 * 2 * layer, 8 * root + 8 * layer + 2 * layer)
    assert training_memory(config, gathered_bytes=4, **arguments).gathered == 0
    assert training_memory(config, recompute="layer", **arguments).activations == (
        2 * (2 * 64 + streams + inside) * 10 * 3
    )


def test_memory_falls_with_ranks_and_with_recomputation():
    config = MorConfig(num_hidden_layers=32, num_recursions=3, sharing="middle_cycle", router="expert_choice")
    arguments = {"rows": 16, "sequence_length": 2048}
    one, eight = (training_memory(config, num_ranks=size, **arguments) for size in (1, 8))
    assert one.states == 16 * count_parameters(config).total == 8 * eight.states
    assert one.activations == eight.activations
    assert one.total == one.states + one.gathered + one.activations
    recursion, layer = (training_memory(config, recompute=unit, **arguments) for unit in ("recursion", "layer"))
    assert layer.activations < 0.3 * recursion.activations < 0.15 * one.activations
    vanilla = MorConfig(num_hidden_layers=32)
    assert one.activations < 0.75 * training_memory(vanilla, **arguments).activations
