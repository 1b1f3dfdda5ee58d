"""The batched, gathered and cached model equals the token-by-token oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.model.calibrate import calibrate
from mor.model.modeling_mor import MorForCausalLM
from mor.model.reference import Reference, reference_forward
from tests.tiny import BUDGET_ROUTERS, KV_CACHES, VOCABULARY, architectures, label, left_padding, random_ids, tiny_model

SIZE = 16


def compare(logits_TV: torch.Tensor, depths_T: torch.Tensor, reference: Reference) -> None:
    assert depths_T.tolist() == reference.depths_T.tolist()
    scale = reference.logits_TV.abs().max().clamp(min=1)
    assert ((logits_TV - reference.logits_TV).abs() / scale).max() < 1e-5


def compare_forward(model: MorForCausalLM, decision: str = "causal", mean_depth: float | None = None) -> Reference:
    """The full forward, with and without a cache, against the oracle."""
    ids = random_ids(2, SIZE)
    reference = reference_forward(model, ids[1].tolist(), decision, mean_depth)
    for use_cache in (False, True):
        output = model(ids, use_cache=use_cache, decision=decision, mean_depth=mean_depth)
        compare(output.logits[1], output.depths[1], reference)
    return reference


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_causal_forward_equals_the_oracle(architecture: dict[str, str]) -> None:
    reference = compare_forward(tiny_model(**architecture))
    varies = architecture["router"] not in ("none", "gate")
    assert (len(reference.depths_T.unique()) > 1) == varies


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_cached_decoding_of_padded_rows_equals_the_oracle(architecture: dict[str, str]) -> None:
    model, ids, mask = tiny_model(**architecture), random_ids(2, SIZE), left_padding(0, 5, size=SIZE)
    cache, logits, depths, start = None, [], [], 0
    for end in [7, *range(8, SIZE + 1)]:
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
        depths.append(output.depths)
    for row, pad in enumerate((0, 5)):
        reference = reference_forward(model, ids[row, pad:].tolist(), attention_positions=range(pad, SIZE))
        compare(torch.cat(logits, 1)[row, pad:], torch.cat(depths, 1)[row, pad:], reference)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "random"])
@torch.no_grad()
def test_top_k_forward_equals_the_oracle(router: str, sharing: str, kv_cache: str) -> None:
    model = tiny_model(router=router, sharing=sharing, kv_cache=kv_cache)
    reference = compare_forward(model, "top_k")
    sizes = [int(capacity * SIZE) for capacity in model.config.capacities or ()]
    assert [int((reference.depths_T > r).sum()) for r in range(len(sizes))] == sizes


@pytest.mark.parametrize(
    "choices",
    [
        {"router_activation": "tanh", "router_alpha": 0.5},
        {"router_activation": "identity"},
        {"router_architecture": "mlp", "router_temperature": 2.0},
        {"router_architecture": "wide_mlp"},
        {"causal_method": "aux_router", "router_temperature": 0.5},
        {"causal_method": "aux_router", "router_activation": "identity", "router_architecture": "mlp"},
        {"causal_method": "none", "gating": "additive"},
        {"capacities": [0.75, 0.5, 0.3]},
        {"capacities": [0.75, 0.5, 0.3], "kv_cache": "shared"},
        {"capacities": [0.75, 0.5, 0.3], "kv_cache": "hybrid"},
        {"capacities": [1.0, 1.0, 0.4]},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"num_key_value_heads": 1, "head_dim": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("decision", ["causal", "top_k"])
@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice"])
@torch.no_grad()
def test_expert_choice_variants_equal_the_oracle(router: str, choices: dict[str, Any], decision: str) -> None:
    if router == "threshold_choice" and choices.get("causal_method") == "aux_router":
        choices = choices | {"causal_method": "none"}
    model = tiny_model(router=router, **choices)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter) / 4)
    compare_forward(model, decision)


@pytest.mark.parametrize(
    "choices",
    [
        {"router_activation": "sigmoid", "router_alpha": 0.3},
        {"router_architecture": "mlp", "router_temperature": 2.0},
        {"gating": "additive"},
        {"balancing": "none"},
        {"balancing": "loss_free"},
        {"balancing": "loss_free", "kv_cache": "shared"},
    ],
    ids=str,
)
@torch.no_grad()
def test_token_choice_variants_equal_the_oracle(choices: dict[str, Any]) -> None:
    model = tiny_model(router="token_choice", **choices)
    plain = compare_forward(model)
    model.model.recursion.router.load_bias.copy_(torch.tensor([0.0, 0.3, -0.1]))
    biased = compare_forward(model)
    moved = not torch.equal(plain.depths_T, biased.depths_T)
    assert moved == (choices.get("balancing") == "loss_free")


@pytest.mark.parametrize("router", ["random", "fixed", "gate"])
@torch.no_grad()
def test_control_variants_equal_the_oracle(router: str) -> None:
    choices: dict[str, Any] = {"router_alpha": 0.4, "gating": "weighted"}
    if router == "random":
        compare_forward(tiny_model(router=router, router_seed=3, capacities=[0.8, 0.8, 0.2], **choices))
    else:
        compare_forward(tiny_model(router=router, router_activation="tanh", **choices))
    compare_forward(tiny_model(router=router, gating="additive"))


@pytest.mark.parametrize("router", BUDGET_ROUTERS)
@torch.no_grad()
def test_budgets_equal_the_oracle(router: str) -> None:
    model = tiny_model(router=router)
    calibrate(model, [random_ids(16, 32, seed=9)])
    budgets = (1.0, 1.37, 2.0, 2.62, 3.0)
    spent = [float(compare_forward(model, mean_depth=budget).depths_T.double().mean()) for budget in budgets]
    assert spent[0] == 1.0
    assert spent == sorted(spent)
    assert spent[-1] == 3.0
    model.config.mean_depth = 1.37
    compare(*forward_row(model), reference_forward(model, random_ids(1, SIZE)[0].tolist(), mean_depth=1.37))


@pytest.mark.parametrize("mean_depth", [1.001, 1.5, 2.999])
@torch.no_grad()
def test_budgets_equal_the_oracle_where_the_first_recursion_is_not_for_all(mean_depth: float) -> None:
    model = tiny_model(router="expert_choice", capacities=[0.8, 0.5, 0.2])
    calibrate(model, [random_ids(16, 32, seed=9)])
    reference = compare_forward(model, mean_depth=mean_depth)
    assert int(reference.depths_T.sum()) > 0


def forward_row(model: MorForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(random_ids(1, SIZE))
    return output.logits[0], output.depths[0]


@pytest.mark.parametrize("mean_depth", [1.2, 2.0, 2.5])
@torch.no_grad()
def test_top_k_budgets_equal_the_oracle(mean_depth: float) -> None:
    compare_forward(tiny_model(router="expert_choice"), "top_k", mean_depth)


@pytest.mark.parametrize("router", ["none", "expert_choice"])
@torch.no_grad()
def test_the_oracle_is_causal(router: str) -> None:
    model, ids = tiny_model(router=router), random_ids(1, SIZE)[0].tolist()
    changed = [*ids[:-1], ids[-1] % (VOCABULARY - 1) + 1]
    first, second = reference_forward(model, ids), reference_forward(model, changed)
    assert torch.equal(first.logits_TV[:-1], second.logits_TV[:-1])
    assert not torch.equal(first.logits_TV[-1], second.logits_TV[-1])


@pytest.mark.parametrize(
    ("model_choices", "asked", "message"),
    [
        ({}, {"decision": "top_k"}, "does not exist for router='none'"),
        ({"router": "token_choice"}, {"decision": "top_k"}, "does not exist for router='token_choice'"),
        ({"router": "expert_choice"}, {"decision": "oracle"}, "decision='oracle'"),
        ({"router": "fixed"}, {"mean_depth": 1.5}, "no budget"),
        ({"router": "expert_choice"}, {"mean_depth": 1.5}, "not within the calibrated nan to nan"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "the reference knows 'default' positions only",
        ),
    ],
)
def test_what_the_oracle_refuses(model_choices: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_forward(tiny_model(**model_choices), [1, 2], **asked)
