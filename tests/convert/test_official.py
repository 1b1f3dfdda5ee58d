"""Checkpoints of the authors' code: every way they are stored, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mor.convert.official import convert_official, from_official, read_weights
from mor.model.modeling_mor import MorForCausalLM
from tests.golden.files import Golden

EXPERT = Golden("c_expert")
UNTIED = Golden("c_expert_as_released")
Weights = dict[str, Tensor]


def converted(golden: Golden, weights: Weights, **options: Any) -> MorForCausalLM:
    return from_official(golden.options, weights, dimensions=golden.dimensions, **options)


def assert_same_weights(one: MorForCausalLM, other: MorForCausalLM) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def all_names(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def last_names_only(golden: Golden) -> Weights:
    """Each shared tensor under the last of its names alone, as a saver that drops aliases may leave it."""
    weights = golden.aliased_parameters
    dropped = {name for first, aliases in golden.info["tied"].items() for name in (first, *aliases)[:-1]}
    return {name: tensor for name, tensor in weights.items() if name not in dropped or name.startswith("model.embed")}


def wrapped(weights: Weights) -> Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def with_rotary_buffers(weights: Weights) -> Weights:
    return weights | {"model.rotary_emb.inv_freq": torch.ones(8)}


@pytest.mark.parametrize("name", ["a_vanilla", "b_recursive_sequence_r2", "c_expert", "e_token_softmax_balloss_zloss"])
@pytest.mark.parametrize("change", [all_names, wrapped, with_rotary_buffers])
def test_names_of_shared_tensors(name: str, change: Callable[[Weights], Weights]) -> None:
    golden = Golden(name)
    expected = converted(golden, golden.parameters)
    assert_same_weights(converted(golden, change(golden.aliased_parameters)), expected)
    assert_same_weights(converted(golden, change(last_names_only(golden))), expected)


def test_heads() -> None:
    recursive = Golden("b_recursive_middle_cycle_r3")
    model = converted(recursive, recursive.parameters)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, recursive.parameters["lm_head.weight"])
    tied = recursive.parameters | {"lm_head.weight": recursive.parameters["model.embed_tokens.weight"].clone()}
    model = converted(recursive, tied)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = recursive.dimensions | {"tie_word_embeddings": False}
    assert not from_official(recursive.options, tied, dimensions=untied).config.tie_word_embeddings
    del tied["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        from_official(recursive.options, tied, dimensions=untied)


def test_attention_that_is_not_shared() -> None:
    weights = UNTIED.parameters
    with pytest.raises(ValueError, match=r"layers\.1\.block\.0\.self_attn\.q_proj\.weight and model\.layers\.2\."):
        converted(UNTIED, weights)
    names = [f"model.layers.{r}.block.1.self_attn.k_proj.weight" for r in (1, 2, 3)]
    first = converted(UNTIED, weights, untied="first").model.recursion.block[1].self_attn.k_proj.weight
    assert torch.equal(first, weights[names[0]])
    average = converted(UNTIED, weights, untied="average").model.recursion.block[1].self_attn.k_proj.weight
    torch.testing.assert_close(average.detach(), torch.stack([weights[name] for name in names]).mean(0))
    with pytest.raises(ValueError, match="untied='last' is unknown"):
        converted(UNTIED, weights, untied="last")


def test_only_attention_may_be_untied() -> None:
    weights = all_names(UNTIED.aliased_parameters)
    weights["model.layers.3.block.1.mlp.up_proj.weight"] += 1
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight should be one shared tensor but differ"):
        converted(UNTIED, weights, untied="average")
    recursive = Golden("b_recursive_middle_cycle_r3")
    weights = all_names(recursive.aliased_parameters)
    weights["model.layers.5.self_attn.q_proj.weight"] += 1
    with pytest.raises(ValueError, match=r"layers\.5\.self_attn\.q_proj\.weight should be one shared tensor"):
        converted(recursive, weights, untied="first")


def test_norms_of_each_recursion() -> None:
    weights = all_names(EXPERT.aliased_parameters)
    weights["model.layers.2.block.0.input_layernorm.weight"] += 1
    with pytest.raises(ValueError, match=r"differ: norms of each recursion's own \(recursive.ln_share=false\)"):
        converted(EXPERT, weights)


def test_dtypes() -> None:
    weights = {name: tensor.bfloat16() for name, tensor in EXPERT.parameters.items()}
    assert converted(EXPERT, with_rotary_buffers(weights)).dtype == torch.bfloat16
    # The released code builds attention in float32 inside a bf16 model.
    mixed = {name: tensor.float() if "self_attn" in name else tensor for name, tensor in weights.items()}
    model = converted(EXPERT, mixed)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"].float())


def test_warmup_counts_as_over() -> None:
    expert = EXPERT.options["mor"]["expert"] | {"cap_warmup_step": 40}
    options = EXPERT.options | {"mor": EXPERT.options["mor"] | {"expert": expert}}
    model = from_official(options, EXPERT.parameters, dimensions=EXPERT.dimensions).train()
    assert int(model.model.recursion.router.training_forwards) == 40
    assert model(EXPERT.tensors["input_ids"]).depths.sum() == EXPERT.tensors["train/depth"].sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda w: w.pop("model.layers.2.mor_router.router.weight"), r"missing tensors: model\.layers\.2\.mor_router"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"wrong shapes: model\.norm\.weight is \(3,\), not \(64,\)",
        ),
        (
            lambda w: w.update({"model.extra": torch.ones(3)}),
            r"tensors without a place in this configuration: model\.extra",
        ),
        (lambda w: w.update({"model.layers.1.mlp_router.router.weight": torch.ones(1, 64)}), "tensors without a place"),
        (lambda w: w.update({"x.q_proj.lora_A.weight": torch.ones(3)}), "relaxed .* of method 'lora'"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Weights], Any], message: str) -> None:
    weights = EXPERT.parameters
    change(weights)
    with pytest.raises(ValueError, match=message):
        converted(EXPERT, weights)


def test_random_router_needs_no_weights() -> None:
    mor = EXPERT.options["mor"] | {"rand_router": True}
    weights = {name: tensor for name, tensor in EXPERT.parameters.items() if "mor_router" not in name}
    model = from_official(EXPERT.options | {"mor": mor}, weights, dimensions=EXPERT.dimensions)
    assert model.config.router == "random"
    mor["expert"] = mor["expert"] | {"sampling": "aux_router"}
    unread = weights | {"model.layers.1.mlp_router.router.weight": torch.ones(1, 64)}
    from_official(EXPERT.options | {"mor": mor}, unread, dimensions=EXPERT.dimensions)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training run's folder with its configuration and no weights yet."""
    options = EXPERT.options | {"model_config": EXPERT.dimensions, "learning_rate": 3e-3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "weights").mkdir()
    return tmp_path


def save_safetensors(folder: Path, weights: Weights) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder


def save_bin(folder: Path, weights: Weights) -> Path:
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def save_shards(folder: Path, weights: Weights, ending: str = "safetensors") -> Path:
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = sorted(weights)
    place = {name: f"{stem}-0000{i % 3 + 1}-of-00003.{ending}" for i, name in enumerate(names)}
    for file in set(place.values()):
        part = {name: weights[name] for name in names if place[name] == file}
        save_file(part, folder / file) if ending == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def save_bin_shards(folder: Path, weights: Weights) -> Path:
    return save_shards(folder, weights, "bin") / "pytorch_model.bin.index.json"


@pytest.mark.parametrize("save", [save_safetensors, save_bin, save_shards, save_bin_shards])
def test_files_to_folder(checkpoint: Path, save: Callable[[Path, Weights], Path]) -> None:
    place = save(checkpoint / "weights", EXPERT.parameters)
    (checkpoint / "weights" / "tokenizer.json").write_text("{}")
    model = convert_official(checkpoint / "config.yaml", place, checkpoint / "out")
    assert_same_weights(model, converted(EXPERT, EXPERT.parameters))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint / "out")
    out = loaded(EXPERT.tensors["input_ids"], decision="top_k")
    torch.testing.assert_close(out.logits, EXPERT.tensors["eval/logits"], rtol=1e-5, atol=2e-4)
    assert torch.equal(out.depths, EXPERT.tensors["eval/depth"])
    assert (checkpoint / "out" / "tokenizer.json").read_text() == "{}"


def test_untied_by_file(checkpoint: Path) -> None:
    place = save_safetensors(checkpoint / "weights", UNTIED.parameters)
    with pytest.raises(ValueError, match="not shared between recursions"):
        convert_official(checkpoint / "config.yaml", place, checkpoint / "out")
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.yaml", "weights"]
    convert_official(checkpoint / "config.yaml", place, checkpoint / "out", untied="average")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_official(checkpoint / "config.yaml", place, checkpoint / "out", untied="first")


class Payload:
    """A pickle that would run code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match="is not a file"):
        read_weights(tmp_path / "model.safetensors")
    for place in (
        save_safetensors(tmp_path, EXPERT.parameters) / "model.safetensors",
        save_bin(tmp_path, EXPERT.parameters),
    ):
        place.write_bytes(place.read_bytes()[:20000])
        with pytest.raises(ValueError, match="damaged, or not a file"):
            read_weights(place)
    torch.save({"model": EXPERT.parameters, "step": 3}, tmp_path / "all.bin")
    with pytest.raises(ValueError, match="expected a state dict"):
        read_weights(tmp_path / "all.bin")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    mark, place = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    torch.save({"weight": Payload(mark)}, place)
    with pytest.raises(ValueError, match="damaged, or not a file"):
        read_weights(place)
    place.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="damaged, or not a file"):
        read_weights(place)
    assert not mark.exists()


def test_incomplete_shards(tmp_path: Path) -> None:
    save_shards(tmp_path, EXPERT.parameters)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names files that are not there: model-00002-of-00003\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not the index of a sharded checkpoint"):
        read_weights(tmp_path)
