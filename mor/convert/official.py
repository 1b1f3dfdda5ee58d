"""Checkpoints of the authors' training code (github.com/raymin0223/mixture_of_recursions) into `MorForCausalLM`.

Their state dicts name every application of a shared layer; names that alias one tensor must agree. The released
expert-choice code builds attention anew for each recursion, so its checkpoints may hold attention that is not shared,
which no Mixture-of-Recursions model can express: such a checkpoint is refused unless the caller says what to do.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mor.convert.llama import layer_prefixes, listed, load_weights, mean, new_model
from mor.convert.official_options import OfficialOptions, official_options, read_official_yaml
from mor.convert.tokenizer_files import copy_tokenizer
from mor.files import new_folder, refuse_occupied
from mor.model.configuration_mor import MorConfig
from mor.model.depth_plan import Step
from mor.model.modeling_mor import MorForCausalLM

Untied = Literal["first", "average"]

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_RELAXATIONS = {"lora_": "lora", "adaption_": "adaption_prompt", "recursion_encod": "recursion_encoding"}


def convert_official(
    config_yaml: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    untied: Untied | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> MorForCausalLM:
    """Convert a checkpoint of the authors' code and save it to the folder `output`.

    `config_yaml`: the configuration it was trained with. `weights`: a safetensors or PyTorch file, the index of a
    sharded one, or the folder with either. `tokenizer`: a folder whose tokenizer files are copied along; default: that
    of the weights. Other arguments as in `from_official`. `output` appears complete or not at all.

    Raises ValueError when a file is missing or damaged, the checkpoint does not fit its configuration, or `output`
    already holds something.
    """
    refuse_occupied(output)
    model = from_official(read_official_yaml(config_yaml), read_weights(weights), untied=untied)
    place = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(tokenizer or place, folder)
    return model


def from_official(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dimensions: Mapping[str, Any] | None = None,
    untied: Untied | None = None,
) -> MorForCausalLM:
    """Build a model from a configuration and a state dict of the authors' code.

    `dimensions`: those of the base model, as in a Llama configuration; default: those of the model the configuration
    names. `untied`: when expert-choice attention differs between recursions, take the `first` recursion's or the
    `average`; the result is then another function, which needs training. The widest dtype among the weights is kept.
    Warm-ups of capacity and balancing count as over.

    Raises ValueError for options without an equivalent, attention that is not shared (without `untied`), aliases that
    differ, and tensors that are missing, left over or of the wrong shape.
    """
    if untied not in (None, "first", "average"):
        raise ValueError(f"untied={untied!r} is unknown; choose 'first' or 'average'")
    official = official_options(options, dimensions=dimensions)
    source = _Source(weights=_canonical(weights), official=official, untied=untied)
    _settle_head(official.config, source.weights)
    model = new_model(official.config, source.dtype, seed=0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = official_names(official, source.weights)
    tensors = {name: source.take(theirs, shapes[name]) for name, theirs in names.items()}
    source.finish()
    load_weights(model, tensors, new=tuple(name for name, _ in model.named_buffers()))
    if model.model.recursion.router is not None:
        model.model.recursion.router.training_forwards.fill_(official.warmup_forwards)
    return model.eval()


def official_names(official: OfficialOptions, present: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Our parameter names -> the names under which the authors' code may have saved each, first recursion first.

    `present` (any mapping with the checkpoint's names as keys) only decides how a router's layers are numbered.
    """
    config = official.config
    outside = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * (not config.tie_word_embeddings)
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in outside}
    for weight, prefix in enumerate(layer_prefixes(config.depth_plan)):
        theirs = [p for step in config.depth_plan.steps if step.weight == weight for p in _layer_names(step, official)]
        for suffix in _layer_suffixes(config):
            names[f"{prefix}.{suffix}"] = tuple(f"{p}.{suffix}" for p in theirs)
    return names | _router_names(official, present)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or PyTorch file, the index of a sharded one, or a folder with either.

    PyTorch files are read with `weights_only=True`: nothing in them is executed. Raises ValueError when nothing is
    there to read, or a file is damaged or holds something else than tensors.
    """
    place = Path(path)
    if place.is_dir():
        found = [place / name for name in _WEIGHT_FILES if (place / name).is_file()]
        if not found:
            raise ValueError(f"{place} holds none of {', '.join(_WEIGHT_FILES)}")
        place = found[0]
    if place.name.endswith(".index.json"):
        return _read_sharded(place)
    if not place.is_file():
        raise ValueError(f"{place} is not a file")
    return _read_file(place)


@dataclass(kw_only=True)
class _Source:
    """The checkpoint while it is taken apart: each tensor is used once, and everything must be used."""

    weights: Mapping[str, Tensor]
    official: OfficialOptions
    untied: Untied | None
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the weights: a bf16 checkpoint may hold attention in float32."""
        kinds = [t.dtype for name, t in self.weights.items() if name.endswith("weight") and t.is_floating_point()]
        return reduce(torch.promote_types, kinds, kinds[0]) if kinds else torch.float32

    def take(self, names: tuple[str, ...], shape: torch.Size) -> Tensor:
        """The one tensor of this shape behind `names`, of which at least one must be there."""
        here = [name for name in names if name in self.weights]
        self.used.update(here)
        if not here:
            self.missing.append(names[0])
        wrong = [name for name in here if self.weights[name].shape != shape]
        self.misshaped += [f"{n} is {tuple(self.weights[n].shape)}, not {tuple(shape)}" for n in wrong]
        if wrong or not here:
            return torch.empty(0)
        return self._agreed(here)

    def _agreed(self, names: list[str]) -> Tensor:
        tensors = [self.weights[name] for name in names]
        other = next((n for n, t in zip(names, tensors, strict=True) if not torch.equal(t, tensors[0])), None)
        if other is None:
            return tensors[0]
        if self.official.layout != "expert" or ".self_attn." not in names[0]:
            raise ValueError(f"{names[0]} and {other} should be one shared tensor but differ{self._hint(names[0])}")
        if self.untied is None:
            raise ValueError(
                f"{names[0]} and {other} differ: this checkpoint was trained with attention that is not shared between "
                "recursions (a defect of the released expert-choice code), which a shared block cannot express; "
                "untied='first' or 'average' converts it all the same, to a model that needs further training"
            )
        return tensors[0] if self.untied == "first" else mean(tensors)

    def _hint(self, name: str) -> str:
        return ": norms of each recursion's own (recursive.ln_share=false) are not supported" * ("layernorm" in name)

    def finish(self) -> None:
        """Raise ValueError for tensors of a wrong shape, expected and not found, or found and not expected."""
        for problem, names in (("wrong shapes", self.misshaped), ("missing tensors", self.missing)):
            if names:
                raise ValueError(f"{problem}: {listed(names)}")
        extra = [name for name in self.weights if name not in self.used and not self._inert(name)]
        if extra:
            raise ValueError(f"tensors without a place in this configuration: {listed(extra)}")

    def _inert(self, name: str) -> bool:
        unused_router = self.official.unused_router and ".mlp_router." in name
        return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or unused_router


def _canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that distributed and compiled wrappers add. Refuses the weights of relaxation."""
    for name in weights:
        if relaxation := next((method for mark, method in _RELAXATIONS.items() if mark in name), None):
            raise ValueError(f"{name}: relaxed (per-recursion) weights of method {relaxation!r} are not supported")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}


def _settle_head(config: MorConfig, weights: Mapping[str, Tensor]) -> None:
    """Untie the head when the checkpoint has one of its own: the authors' recursive class never ties it."""
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        config.tie_word_embeddings = False


def _layer_suffixes(config: MorConfig) -> list[str]:
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for part, projections, bias in (
        ("self_attn", "qkvo", config.attention_bias),
        ("mlp", ("gate", "up", "down"), config.mlp_bias),
    ):
        kinds = ("weight", "bias") if bias else ("weight",)
        names += [f"{part}.{projection}_proj.{kind}" for projection in projections for kind in kinds]
    return names


def _layer_names(step: Step, official: OfficialOptions) -> list[str]:
    """Prefixes that one application of a layer may have in the authors' state dict."""
    plan, layout = official.config.depth_plan, official.layout
    if layout == "plain":
        return [f"model.layers.{step.layer}"]
    if step.recursion is None:
        after = plan.num_recursions + 1 if layout == "expert" else 2
        return [f"model.layers.{0 if step.layer == 0 else after}"]
    if layout == "expert":
        return [f"{_wrappers(official, step.recursion)[0]}.block.{step.block_layer}"]
    return [f"{wrapper}.block_list.{step.recursion}.{step.block_layer}" for wrapper in _wrappers(official, 0)]


def _wrappers(official: OfficialOptions, recursion: int) -> list[str]:
    """Prefixes of the module that wraps the block: one per recursion (expert), or one in all (token)."""
    outer = official.config.depth_plan.num_outer
    if official.layout == "expert":
        return [f"model.layers.{outer + recursion}"]
    # With sharing=cycle the authors' token-choice code replaces the list of layers by the wrapper itself.
    return [f"model.layers.{outer}"] + ["model.layers"] * (outer == 0)


def _router_names(official: OfficialOptions, present: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    config = official.config
    ours = "model.recursion.router"
    names: dict[str, tuple[str, ...]] = {}
    if config.router == "expert_choice":
        for r in range(config.num_recursions):
            (wrapper,) = _wrappers(official, r)
            names |= _head_names(config, f"{ours}.heads.{r}", f"{wrapper}.mor_router", present)
            if config.causal_method == "aux_router":
                names |= _head_names(config, f"{ours}.auxiliary_heads.{r}", f"{wrapper}.mlp_router", present)
    elif config.router == "token_choice":
        wrapper = next(
            (w for w in _wrappers(official, 0) if any(n.startswith(f"{w}.mor_router.") for n in present)), None
        )
        wrapper = wrapper or _wrappers(official, 0)[0]
        names |= _head_names(config, f"{ours}.head", f"{wrapper}.mor_router", present)
        if config.balancing == "loss_free":
            names[f"{ours}.load_bias"] = (f"{wrapper}.router_bias",)
    return names


def _head_names(config: MorConfig, ours: str, theirs: str, present: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """A router's weights, in the order in which its linear maps are applied."""
    inner = ("0", "2") if config.router_architecture == "mlp" else ("0",)
    found = sorted(name for name in present if name.startswith(f"{theirs}."))
    if len(found) != len(inner):
        plain = f"{theirs}.router.weight"
        found = [plain] if len(inner) == 1 else [f"{theirs}.router.{i}.weight" for i in inner]
    return {f"{ours}.{i}.weight": (name,) for i, name in zip(inner, found, strict=True)}


def _read_sharded(index: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not the index of a sharded checkpoint") from error
    lost = [name for name in files if not (index.parent / name).is_file()]
    if lost:
        raise ValueError(f"{index} names files that are not there: {listed(lost)}")
    return {name: tensor for file in files for name, tensor in _read_file(index.parent / file).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or not a file that torch.save wrote")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: damaged, or not a file of tensors: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ValueError(f"{path}: expected a state dict (names to tensors)")
    return weights
