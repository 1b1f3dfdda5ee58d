"""The authors' YAML, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mor.convert.official_options import official_options, read_official_yaml
from mor.model.cost import count_parameters

EXPERT = """
name: 360M expert
model: smollm
model_name_or_path: HuggingFaceTB/SmolLM-360M
tokenizer: smollm
use_pretrained_weights: false
attn_implementation: flash_attention_2
precision: bf16
dataset: fineweb_edu
learning_rate: 3e-3
max_length: 2048
total_batch_size: 1024
per_device_train_batch_size: 16
gradient_accumulation_steps: 16
num_train_steps: 14161
num_warmup_steps: 86
evaluation:
  enable: true
recursive:
  enable: true
  base_depth: null
  num_recursion: 3
  sharing: middle_cycle
  ln_share: true
  initialization: random
kv_sharing:
  enable: false
  num_recursion: ${recursive.num_recursion}
  sharing: ${recursive.sharing}
  update_cache: false
relaxation:
  enable: false
  method: lora
  lora: {r: 64}
mor:
  enable: true
  type: expert
  capacity: null
  rand_router: false
  router_type: linear
  z_loss: false
  z_coeff: 1e-3
  temp: 1.0
  expert:
    cap_warmup_step: 0
    router_func: sigmoid
    alpha: 0.1
    sampling: aux_loss
    include_first: true
    coeff: 1e-3
    gating: weighted
  token:
    bal_warmup_step: 0
    router_func: softmax
    alpha: 1.0
    balancing: loss
    coeff: 0.1
    u: 0.001
    gating: weighted
"""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "expert.yaml"
    path.write_text(EXPERT)
    return read_official_yaml(path)


def test_the_papers_expert_choice(options: dict[str, Any]) -> None:
    official = official_options(options)
    config = official.config
    assert official.layout == "expert"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (960, 32, 15)
    assert (config.num_recursions, config.sharing, config.kv_cache) == (3, "middle_cycle", "recursion")
    assert (config.router, config.router_activation, config.router_alpha) == ("expert_choice", "sigmoid", 0.1)
    assert config.capacities == [1.0, 2 / 3, 1 / 3]
    assert (config.causal_method, config.router_aux_loss_coef, config.router_z_loss_coef) == ("aux_loss", 0.001, 0.0)
    assert config.max_position_embeddings == 2048
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


# Measured with the authors' code, as it was meant to be built (tied head, shared attention).
COUNTS = {
    ("vanilla", 1, None): 361_821_120,
    ("expert", 2, None): 214_338_240,
    ("expert", 3, None): 165_177_600,
    ("expert", 4, 34): 145_513_920,
    ("token", 3, None): 165_177_600,
}


@pytest.mark.parametrize(("kind", "num_recursion", "layers"), COUNTS)
def test_parameters_of_the_papers_360m_models(
    options: dict[str, Any], kind: str, num_recursion: int, layers: int | None
) -> None:
    options["mor"] |= {"type": kind, "enable": kind != "vanilla"}
    options["recursive"] |= {"num_recursion": num_recursion, "enable": kind != "vanilla"}
    options["model_config"] = {"num_hidden_layers": layers} if layers else None
    config = official_options(options).config
    assert count_parameters(config).total == COUNTS[kind, num_recursion, layers]


@pytest.mark.parametrize(
    ("section", "changes", "found"),
    [
        ("mor", {"router_type": "mlp"}, {"router_architecture": "mlp"}),
        ("mor", {"router_type": "wide_mlp"}, {"router_architecture": "mlp"}),
        ("mor", {"temp": 2}, {"router_temperature": 2.0}),
        ("mor", {"z_loss": True, "z_coeff": "1e-5"}, {"router_z_loss_coef": 1e-5}),
        ("mor", {"capacity": "1.0, 0.5,0.25"}, {"capacities": [1.0, 0.5, 0.25]}),
        ("mor", {"capacity": [1, 0.5, 0.5]}, {"capacities": [1.0, 0.5, 0.5]}),
        ("mor", {"rand_router": True}, {"router": "random", "router_alpha": 0.1, "causal_method": "none"}),
        ("expert", {"router_func": None}, {"router_activation": "identity"}),
        ("expert", {"router_func": "tanh", "alpha": 0.3}, {"router_activation": "tanh", "router_alpha": 0.3}),
        ("expert", {"sampling": "aux_router"}, {"causal_method": "aux_router"}),
        ("expert", {"sampling": None}, {"causal_method": "none"}),
        ("expert", {"gating": "additive", "coeff": 0.01}, {"gating": "additive", "router_aux_loss_coef": 0.01}),
        ("expert", {"cap_warmup_step": 500}, {"capacity_warmup_steps": 500}),
        ("expert", {"cap_warmup_step": None}, {"capacity_warmup_steps": 86 * 16}),
        ("kv_sharing", {"enable": True}, {"kv_cache": "shared"}),
        ("kv_sharing", {"enable": True, "update_cache": True}, {"kv_cache": "hybrid"}),
        ("recursive", {"sharing": "cycle"}, {"sharing": "cycle", "num_hidden_layers": 30}),
        (
            "model_config",
            {"num_hidden_layers": 30, "rms_norm_eps": "1e-6"},
            {"num_hidden_layers": 29, "rms_norm_eps": 1e-6},
        ),
    ],
)
def test_expert_choice_keys(options: dict[str, Any], section: str, changes: dict, found: dict) -> None:
    change(options, section, changes)
    config = official_options(options).config
    assert {key: getattr(config, key) for key in found} == found


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {"router_activation": "softmax", "router_alpha": 1.0, "balancing": "loss", "balancing_loss_coef": 0.1}),
        ({"alpha": None}, {"router_alpha": 1.0}),
        ({"router_func": "sigmoid", "alpha": None}, {"router_activation": "sigmoid", "router_alpha": 0.1}),
        ({"balancing": "loss_free", "u": "1e-4"}, {"balancing": "loss_free", "balancing_update_rate": 1e-4}),
        ({"balancing": None}, {"balancing": "none"}),
        ({"bal_warmup_step": 10}, {"balancing_warmup_steps": 160}),
        ({"gating": "additive"}, {"gating": "additive"}),
    ],
)
def test_token_choice_keys(options: dict[str, Any], changes: dict, found: dict) -> None:
    options["mor"]["type"] = "token"
    change(options, "token", changes)
    config = official_options(options).config
    assert config.router == "token_choice"
    assert {key: getattr(config, key) for key in found} == found


def test_token_choice_ignores_the_cache_update(options: dict[str, Any]) -> None:
    options["mor"]["type"] = "token"
    change(options, "kv_sharing", {"enable": True, "update_cache": True})
    assert official_options(options).config.kv_cache == "shared"


def test_without_routing(options: dict[str, Any]) -> None:
    options["mor"]["enable"] = False
    assert official_options(options).config.router == "none"
    change(options, "kv_sharing", {"enable": True, "update_cache": True})
    assert official_options(options).config.kv_cache == "shared"
    change(options, "kv_sharing", {"enable": False})
    change(options, "recursive", {"num_recursion": 1, "base_depth": 12})
    config = official_options(options).config
    assert (config.num_recursions, config.sharing, config.num_hidden_layers) == (1, "none", 12)


def test_warmup_lengths_that_are_not_given(options: dict[str, Any]) -> None:
    change(options, "expert", {"cap_warmup_step": None})
    del options["gradient_accumulation_steps"]
    assert official_options(options).config.capacity_warmup_steps == 86 * 64, "as on one device"
    options["num_warmup_steps"] = None
    assert official_options(options).config.capacity_warmup_steps == int(0.05 * 14161) * 64
    assert official_options(options).warmup_forwards == int(0.05 * 14161) * 64


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("HuggingFaceTB/SmolLM-135M", (576, 30, 2048, 10000.0)),
        ("HuggingFaceTB/SmolLM-1.7B", (2048, 24, 2048, 10000.0)),
        ("HuggingFaceTB/SmolLM2-135M", (576, 30, 8192, 100000.0)),
        ("HuggingFaceTB/SmolLM2-1.7B", (2048, 24, 8192, 130000.0)),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", (2048, 22, 2048, 10000.0)),
    ],
)
def test_named_models(name: str, sizes: tuple[int, int, int, float]) -> None:
    config = official_options({"model": "smollm", "model_name_or_path": name}).config
    assert config.rope_parameters is not None
    found = (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings)
    assert (*found, config.rope_parameters["rope_theta"]) == sizes


def test_a_model_by_its_dimensions() -> None:
    dimensions = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    dimensions |= {"num_key_value_heads": 1, "num_hidden_layers": 2}
    options = {"model_name_or_path": "someone/else", "model_config": dimensions}
    assert official_options(options).config.hidden_size == 8
    del dimensions["num_hidden_layers"]
    with pytest.raises(ValueError, match="'someone/else' is not known, and model_config lacks num_hidden_layers"):
        official_options(options)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("recursive", {"num_recursions": 3}, "unknown key recursive.num_recursions; did you mean 'num_recursion'"),
        ("recursive", {"enable": False}, "mor.enable=true needs recursive.enable=true"),
        ("recursive", {"num_recursion": 1}, "routing needs at least two recursions"),
        ("recursive", {"num_recursion": 2.5}, "recursive.num_recursion=2.5 must be a whole number"),
        ("recursive", {"num_recursion": 40}, "num_recursions=40 cannot share the 30 inner layers"),
        ("recursive", {"sharing": "spiral"}, "recursive.sharing='spiral': choose one of 'cycle'"),
        ("recursive", {"sharing": "sequence"}, "needs whole-block recursions"),
        ("mor", {"type": "layer"}, "mor.type='layer': choose one of 'expert', 'token'"),
        ("mor", {"enable": "yes"}, "mor.enable='yes' must be true or false"),
        ("mor", {"router_type": "rnn"}, "mor.router_type='rnn'"),
        ("mor", {"temp": "hot"}, "mor.temp='hot' must be a number"),
        ("mor", {"capacity": "1.0,0.5"}, "needs one entry per recursion: 3"),
        ("mor", {"type": "token", "rand_router": True}, "a random depth per token is not supported"),
        ("expert", {"router_func": "relu"}, "mor.expert.router_func='relu'"),
        ("expert", {"sampling": "gumbel"}, "mor.expert.sampling='gumbel'"),
        ("expert", {"bal_warmup_step": 3}, "unknown key mor.expert.bal_warmup_step"),
        ("token", {"alpa": 3}, "unknown key mor.token.alpa; did you mean 'alpha'"),
        ("relaxation", {"enable": True}, "relaxation.method='lora'"),
        ("model_config", {"hiden_size": 3}, "unknown key model_config.hiden_size; did you mean 'hidden_size'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], section: str, changes: dict, message: str) -> None:
    options["mor"].setdefault("token", {})
    change(options, section, changes)
    if section == "token":
        options["mor"]["type"] = "token"
    with pytest.raises(ValueError, match=message):
        official_options(options)


def test_a_missing_activation_is_not_taken_for_none(options: dict[str, Any]) -> None:
    del options["mor"]["expert"]["router_func"]
    with pytest.raises(ValueError, match=r"mor\.expert\.router_func is missing"):
        official_options(options)


def test_layers_dropped_under_kv_sharing_are_refused(options: dict[str, Any]) -> None:
    change(options, "kv_sharing", {"enable": True})
    change(options, "model_config", {"num_hidden_layers": 30})
    with pytest.raises(ValueError, match="drops 1 of them and then shares keys and values between the wrong layers"):
        official_options(options)


def test_hybrid_needs_middle_cycle(options: dict[str, Any]) -> None:
    change(options, "kv_sharing", {"enable": True, "update_cache": True})
    change(options, "recursive", {"sharing": "cycle"})
    change(options, "model_config", {"num_hidden_layers": 30})
    with pytest.raises(ValueError, match="update_cache=true needs"):
        official_options(options)


def test_sections_that_are_not_known(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown section 'kv_shareing'; did you mean 'kv_sharing'"):
        official_options(options | {"kv_shareing": {"enable": True}})
    with pytest.raises(ValueError, match="unknown section 'early_exit' is enabled"):
        official_options(options | {"early_exit": {"enable": True}})
    official_options(options | {"early_exit": {"enable": False}, "wandb_run_id": "x", "stop_steps": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a mapping"),
        ("a: [1", "cannot be read as YAML"),
        ("a: ${b.c}", "refers to a key that the configuration does not have"),
        ("a: ${a}", "refers to itself"),
        ("defaults: [base, _self_]", "builds on other files"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_official_yaml(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_official_yaml(tmp_path / "nothing.yaml")


def change(options: dict[str, Any], section: str, changes: dict[str, Any]) -> None:
    parent = options["mor"] if section in ("expert", "token") else options
    parent[section] = (parent.get(section) or {}) | changes
