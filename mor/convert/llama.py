"""Llama-family checkpoints of Hugging Face into vanilla, recursive and Mixture-of-Recursions models, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from mor.convert.initialization import Initialization, LayerSources, layer_sources
from mor.convert.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from mor.files import new_folder, refuse_occupied
from mor.model.configuration_mor import MorConfig
from mor.model.depth_plan import DepthPlan, Sharing
from mor.model.modeling_mor import MorForCausalLM

# Families whose decoder computes Llama's function, given the checks of `check_source`.
FITTING_FAMILIES = ("llama", "mistral", "qwen2")

_REASONS = {
    "qwen3": "it normalises queries and keys",
    "olmo": "its norms have no weights",
    "olmo2": "it normalises after each sub-layer and normalises queries and keys",
    "gemma": "it scales embeddings and norms differently",
    "gemma2": "it caps logits and normalises after each sub-layer",
    "gemma3_text": "it normalises queries and keys and mixes sliding windows",
    "phi3": "its projections are fused and its rotary positions partial",
    "smollm3": "some of its layers have no rotary positions",
    "granite": "it multiplies embeddings, residuals and logits by factors of its own",
    "cohere": "its attention and feed-forward run in parallel",
    "gpt_neox": "it is not pre-RMSNorm with a gated feed-forward",
    "mixtral": "its feed-forward is a mixture of experts",
    "mor": "it is already a model of this project",
}

_SAME_KEYS = (
    "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings attention_dropout"
).split()


def convert_llama(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_recursions: int = 1,
    sharing: Sharing | None = None,
    initialization: Initialization = "stepwise",
    router: str = "none",
    kv_cache: str = "recursion",
    seed: int = 0,
    gguf_file: str | None = None,
    revision: str | None = None,
    **config_options: Any,
) -> MorForCausalLM:
    """Convert a checkpoint folder or hub name and save the result, with the source's tokenizer, to the folder `output`.

    `gguf_file`: name of a GGUF file in the source, dequantised (needs the `gguf` package). Other arguments as in
    `from_llama`. The weights keep their dtype. `output` appears complete or not at all.

    Raises ValueError when the source does not fit, is damaged, or `output` already holds something.
    """
    refuse_occupied(output)
    model = from_llama(
        load_llama(source, gguf_file=gguf_file, revision=revision),
        num_recursions=num_recursions,
        sharing=sharing,
        initialization=initialization,
        router=router,
        kv_cache=kv_cache,
        seed=seed,
        **config_options,
    )
    tokenizer = Path(source)
    if not tokenizer.is_dir():
        tokenizer = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)
    return model


def load_llama(
    source: str | os.PathLike[str], *, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Load a Llama-family model in the dtype it is stored in, on the CPU.

    Raises ValueError when the family does not fit (before any weight is read), or when weights are missing, damaged or
    of the wrong shape; OSError when a hub name cannot be resolved.
    """
    where = os.fspath(source)
    if (os.path.isabs(where) or where.startswith(".")) and not os.path.isdir(where):
        raise ValueError(f"source={where!r} is not a folder; give a checkpoint folder or a hub name")
    found: dict[str, Any] = {"revision": revision or "main"} | ({"gguf_file": gguf_file} if gguf_file else {})
    check_source(AutoConfig.from_pretrained(where, **found))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype="auto", output_loading_info=True, **found)
    except SafetensorError as error:
        raise ValueError(f"source={where!r}: a weight file is damaged: {error}") from error
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(
                f"source={where!r}: {problem.replace('_', ' ')}: {listed(sorted(map(str, report[problem])))}"
            )
    return model


def from_llama(
    source: PreTrainedModel,
    *,
    num_recursions: int = 1,
    sharing: Sharing | None = None,
    initialization: Initialization = "stepwise",
    router: str = "none",
    kv_cache: str = "recursion",
    seed: int = 0,
    **config_options: Any,
) -> MorForCausalLM:
    """Build a model on copies of the weights of a Llama-family model.

    With one recursion the result computes the same function. With more, `initialization` says which layers the shared
    block starts from (arXiv 2507.10524, section 4.1); layers are dropped evenly when the recursions do not divide
    them, and `num_hidden_layers` of the result says how many remain. Embedding, final norm and head are kept.

    `sharing`: default none for one recursion, else `middle_cycle`. `seed`: of new router weights and of the draw of
    `initialization="random"`. `config_options`: further `MorConfig` keys, for instance `capacities`.

    Raises ValueError when the source does not fit or the options do not go together.
    """
    check_source(source.config)
    chosen = layer_sources(
        source.config.num_hidden_layers,
        num_recursions=num_recursions,
        sharing=sharing or ("none" if num_recursions == 1 else "middle_cycle"),
        initialization=initialization,
        seed=seed,
    )
    weights = dict(source.state_dict())
    config = MorConfig(
        **_dimensions(source.config, weights),
        num_hidden_layers=chosen.plan.num_layers,
        num_recursions=num_recursions,
        sharing=chosen.plan.sharing,
        router=router,
        kv_cache=kv_cache,
        **config_options,
    )
    model = new_model(config, source.dtype, seed)
    load_weights(model, _shared_weights(weights, chosen, config), new=("model.recursion.router.",))
    if source.generation_config is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def to_llama(model: MorForCausalLM) -> LlamaForCausalLM:
    """The plain Llama that computes the same function: every layer application becomes a layer of its own.

    Raises ValueError for a model with a router or whose recursions share keys and values: no plain model equals it.
    """
    config = model.config
    if config.router != "none":
        raise ValueError(f"router={config.router!r}: only a model without a router is equal to a plain Llama")
    if config.kv_cache != "recursion" and config.num_recursions > 1:
        raise ValueError(f"kv_cache={config.kv_cache!r}: a plain Llama has keys and values of its own in every layer")
    own = model.state_dict()
    prefixes = layer_prefixes(config.depth_plan)
    weights = {name: own[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    weights["lm_head.weight"] = own["lm_head.weight"]
    for step in config.depth_plan.steps:
        for suffix, tensor in _under(own, prefixes[step.weight]).items():
            weights[f"model.layers.{step.layer}.{suffix}"] = tensor
    keys = (*_SAME_KEYS, "head_dim", "rope_parameters", "attention_bias", "mlp_bias", "num_hidden_layers")
    llama_config = LlamaConfig(**{key: getattr(config, key) for key in keys})
    llama = LlamaForCausalLM._from_config(llama_config, dtype=model.dtype)
    llama.load_state_dict(weights)
    return llama.eval()


def check_source(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the reason, unless models of this configuration compute Llama's function."""
    family = config.model_type
    if family not in FITTING_FAMILIES:
        reason = _REASONS.get(family, "its function is not known to equal Llama's")
        raise ValueError(f"model_type={family!r} does not fit: {reason}; these do: {', '.join(FITTING_FAMILIES)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(f"sliding_window={window}: attention within a sliding window is not supported")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(f"layer_types={sorted(set(config.layer_types))}: only 'full_attention' layers are supported")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is unknown; 'silu' is Llama's")
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method not in (None, "gguf"):  # GGUF weights are dequantised when they are loaded
        raise ValueError(f"the source is quantised with {method!r}; convert an unquantised checkpoint")
    partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial}: rotary positions on a part of each head are not supported")


def layer_prefixes(plan: DepthPlan) -> tuple[str, ...]:
    """Parameter-name prefixes of the unique layers, in the plan's order."""
    block = (f"model.recursion.block.{layer}" for layer in range(plan.block_size))
    if plan.num_outer:
        return ("model.first_layers.0", *block, "model.last_layers.0")
    return tuple(block)


def new_model(config: MorConfig, dtype: torch.dtype, seed: int) -> MorForCausalLM:
    """A freshly initialised model on the CPU, the same for the same seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MorForCausalLM._from_config(config, dtype=dtype)


def load_weights(model: MorForCausalLM, weights: Mapping[str, Tensor], *, new: Sequence[str] = ()) -> None:
    """Copy `weights` into `model`; parameters and buffers under the prefixes `new` may keep their initial values.

    Raises ValueError naming the tensors that are missing, left over, or of the wrong shape.
    """
    own = model.state_dict()
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    missing = [name for name in own if name not in weights and name not in tied and not name.startswith(tuple(new))]
    shapes = [
        f"{name} has shape {tuple(tensor.shape)}, needs {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    extra = [name for name in weights if name not in own]
    for problem, names in (("missing tensors", missing), ("tensors without a place", extra), ("wrong shapes", shapes)):
        if names:
            raise ValueError(f"{problem}: {listed(names)}")
    model.load_state_dict(dict(weights), strict=False)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of equally shaped tensors, accumulated in at least float32, in their dtype; one tensor is returned as is."""
    if len(tensors) == 1:
        return tensors[0]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([t.to(wide) for t in tensors]).mean(0).to(tensors[0].dtype)


def _dimensions(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MorConfig` keys that say the same as the source's configuration and weights."""
    same = {key: getattr(config, key) for key in _SAME_KEYS}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    biased = {
        name.split(".")[3] for name in weights if name.startswith("model.layers.0.") and name.endswith("proj.bias")
    }
    return same | {
        "head_dim": head_dim,
        "rope_parameters": config.rope_parameters,
        "attention_bias": "self_attn" in biased,
        "mlp_bias": "mlp" in biased,
    }


def _shared_weights(weights: Mapping[str, Tensor], chosen: LayerSources, config: MorConfig) -> dict[str, Tensor]:
    outside = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.")}
    if config.tie_word_embeddings:
        outside.pop("lm_head.weight", None)
    used = {layer for group in chosen.sources for layer in group}
    layers = {layer: _with_zero_biases(_under(weights, f"model.layers.{layer}"), config) for layer in used}
    for prefix, group in zip(layer_prefixes(chosen.plan), chosen.sources, strict=True):
        for suffix in layers[group[0]]:
            outside[f"{prefix}.{suffix}"] = mean([layers[layer][suffix] for layer in group])
    return outside


def _with_zero_biases(layer: dict[str, Tensor], config: MorConfig) -> dict[str, Tensor]:
    """Families that bias only some projections compute the same with zeros for the others."""
    biased = ("self_attn.",) * config.attention_bias + ("mlp.",) * config.mlp_bias
    for name in [name for name in layer if name.startswith(biased) and name.endswith("proj.weight")]:
        weight = layer[name]
        layer.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return layer


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(prefix + ".")}


def listed(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
