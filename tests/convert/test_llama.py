"""Llama-family checkpoints: the same function with one recursion, the right layers with more, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from mor.convert.initialization import INITIALIZATIONS, layer_sources
from mor.convert.llama import check_source, convert_llama, from_llama, layer_prefixes, load_llama, to_llama
from mor.model.cache_name import CACHE_NAME
from mor.model.modeling_mor import MorForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-queries": {},
    "as-many-keys": {"num_key_value_heads": 6},
    "one-key": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention-bias": {"attention_bias": True},
    "wide-heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 250.0}},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "rope-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "rope-llama3": {"rope_parameters": LLAMA3},
    "rope-yarn": {"rope_parameters": YARN},
}


def strengthened(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights large enough that every part of the model matters, biases and norms included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.eval()


def llama(**changes: Any) -> LlamaForCausalLM:
    return strengthened(LlamaForCausalLM(LlamaConfig(**SMALL | changes)))  # type: ignore[return-value]


def tokens(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length))


@torch.no_grad()
def decoded_logits(model: PreTrainedModel, input_ids: Tensor, prefill: int) -> Tensor:
    """Logits of a prefill and of one token at a time after it."""
    out = model(input_ids[:, :prefill], use_cache=True)
    logits = [out.logits]
    for t in range(prefill, input_ids.shape[1]):
        out = model(input_ids[:, t : t + 1], **{CACHE_NAME: out[CACHE_NAME]}, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_same_function(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    input_ids = tokens()
    with torch.no_grad():
        expected = theirs(input_ids).logits
        torch.testing.assert_close(ours(input_ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5, "a model that says nothing would agree with anything"
    for prefill in (1, 7):
        torch.testing.assert_close(decoded_logits(ours, input_ids, prefill), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded_logits(theirs, input_ids, prefill), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vanilla_equals_llama(variant: str) -> None:
    source = llama(**VARIANTS[variant])
    model = from_llama(source)
    assert (model.config.num_recursions, model.config.router) == (1, "none")
    assert_same_function(model, source)


def test_mistral_without_a_window_fits() -> None:
    source = strengthened(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)))
    assert_same_function(from_llama(source), source)
    config = MistralConfig(**SMALL, sliding_window=64)
    check_source(config)
    config.sliding_window = 63
    with pytest.raises(ValueError, match="sliding_window=63"):
        check_source(config)


def test_qwen2_with_its_partial_biases_fits() -> None:
    source = strengthened(Qwen2ForCausalLM(Qwen2Config(**SMALL)))
    model = from_llama(source)
    assert model.config.attention_bias
    assert not model.model.recursion.block[0].self_attn.o_proj.bias.any()
    assert_same_function(model, source)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "sequence", "middle_sequence"])
def test_one_recursion_is_vanilla_under_every_sharing(sharing: Any) -> None:
    source = llama()
    model, input_ids = from_llama(source, sharing=sharing), tokens()
    torch.testing.assert_close(model(input_ids).logits, source(input_ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "sequence", "middle_sequence"])
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("num_recursions", [2, 3])
def test_shared_layers_start_from_their_sources(sharing: Any, initialization: Any, num_recursions: int) -> None:
    source = llama(attention_bias=True)
    options: dict[str, Any] = {"num_recursions": num_recursions, "sharing": sharing, "initialization": initialization}
    model = from_llama(source, **options, seed=3)
    chosen = layer_sources(8, **options, seed=3)
    assert model.config.num_hidden_layers == len(chosen.kept)
    own, theirs = model.state_dict(), source.state_dict()
    for prefix, layers in zip(layer_prefixes(model.config.depth_plan), chosen.sources, strict=True):
        for name in [name for name in own if name.startswith(f"{prefix}.")]:
            suffix = name.removeprefix(prefix)
            expected = torch.stack([theirs[f"model.layers.{layer}{suffix}"] for layer in layers]).mean(0)
            torch.testing.assert_close(own[name], expected, rtol=1e-6, atol=1e-7)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(own[name], theirs[name])
        assert own[name].data_ptr() != theirs[name].data_ptr(), "a copy, so that training one leaves the other alone"


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle", "sequence", "middle_sequence"])
def test_recursive_model_is_the_llama_with_repeated_layers(sharing: Any) -> None:
    model = from_llama(llama(), num_recursions=2, sharing=sharing)
    assert_same_function(model, to_llama(model))


def test_export_of_a_vanilla_model_is_the_source() -> None:
    source = llama(tie_word_embeddings=False, attention_bias=True, rope_parameters=LLAMA3)
    back = to_llama(from_llama(source))
    assert back.config.rope_parameters == source.config.rope_parameters
    for name, tensor in source.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_export_needs_a_plain_equivalent() -> None:
    with pytest.raises(ValueError, match="router='expert_choice'"):
        to_llama(from_llama(llama(), num_recursions=2, router="expert_choice"))
    with pytest.raises(ValueError, match="kv_cache='shared'"):
        to_llama(from_llama(llama(), num_recursions=2, kv_cache="shared"))


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
def test_routers_are_new_and_the_rest_is_kept(router: str, kv_cache: str) -> None:
    source = llama()
    before = torch.get_rng_state()
    first = from_llama(source, num_recursions=3, router=router, kv_cache=kv_cache, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again = from_llama(source, num_recursions=3, router=router, kv_cache=kv_cache, seed=1)
    other = from_llama(source, num_recursions=3, router=router, kv_cache=kv_cache, seed=2)
    assert (first.config.router, first.config.kv_cache, first.config.sharing) == (router, kv_cache, "middle_cycle")
    routers = [name for name in dict(first.named_parameters()) if ".router." in name]
    assert routers
    for name, tensor in first.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name))
        assert torch.equal(tensor, other.get_parameter(name)) == (name not in routers)
    assert first(tokens()).logits.isfinite().all()


def test_further_options_reach_the_configuration() -> None:
    model = from_llama(llama(), num_recursions=2, router="expert_choice", capacities=[1.0, 0.25], gating="additive")
    assert (model.config.capacities, model.config.gating) == ([1.0, 0.25], "additive")
    with pytest.raises(ValueError, match="did you mean 'capacities'"):
        from_llama(llama(), num_recursions=2, router="expert_choice", capacity=[1.0, 0.25])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3Config(**SMALL), "model_type='qwen3' does not fit: it normalises queries and keys"),
        (GemmaConfig(**SMALL), "model_type='gemma' does not fit: it scales"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2), "sliding_window=8"),
        (LlamaConfig(**SMALL, hidden_act="swoosh"), "hidden_act='swoosh' is unknown"),
        (LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq"}), "quantised"),
        (
            LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "partial_rotary_factor=0.5",
        ),
    ],
    ids=["qwen3", "gemma", "window", "activation", "quantised", "partial-rotary"],
)
def test_models_of_another_function_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_source(config)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="b").save_pretrained(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A Llama checkpoint in bf16, sharded, with a tokenizer and a generation configuration of its own."""
    folder = tmp_path / "llama"
    source = llama().to(torch.bfloat16)
    source.generation_config.eos_token_id = [1, 5]
    source.save_pretrained(folder, max_shard_size="50KB")
    save_tokenizer(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def test_folder_to_folder(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "mor"
    model = convert_llama(saved, output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    source = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert isinstance(loaded, MorForCausalLM)
    assert loaded.dtype == source.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == [1, 5]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) or tensor.isnan().any(), name
    assert_same_function(loaded.float(), source.float())
    assert AutoTokenizer.from_pretrained(output)("a b").input_ids == [0, 1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_random_initialization_of_a_folder_repeats(saved: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_recursions": 3, "router": "expert_choice", "initialization": "random", "seed": 4}
    convert_llama(saved, tmp_path / "one", **options)
    convert_llama(saved, tmp_path / "two", **options)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_nothing_is_written_when_it_fails(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="num_recursions=9"):
        convert_llama(saved, tmp_path / "mor", num_recursions=9)
    monkeypatch.setattr("mor.convert.llama.copy_tokenizer", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        convert_llama(saved, tmp_path / "mor")
    assert sorted(tmp_path.iterdir()) == before


def test_occupied_output_is_left_alone(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "mor"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_llama(saved, output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_missing_and_damaged_sources(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_llama(tmp_path / "nowhere")
    index = saved / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    whole = (saved / shards[0]).read_bytes()
    (saved / shards[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_llama(saved)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    source = llama()
    weights = {name: tensor for name, tensor in source.state_dict().items() if "layers.3.mlp.up" not in name}
    source.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.3\.mlp\.up_proj\.weight"):
        load_llama(tmp_path)
