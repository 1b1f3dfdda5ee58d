"""The model in assets/: small, whole, causal, and honest about where it comes from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mor.cli import main
from mor.evaluate.causality import suffix_probe
from mor.loading import load_model
from mor.model.modeling_mor import MorForCausalLM
from mor.recipes import recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "assets" / "mor-8m"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
MOST_BYTES = 16_000_000
PROMPT = "Fellow citizens, the state of the union"


@pytest.fixture(scope="module")
def loaded() -> tuple[MorForCausalLM, Any]:
    return load_model(FOLDER, device="cpu")


def test_the_weights_are_bfloat16_and_small() -> None:
    file = FOLDER / "model.safetensors"
    assert file.stat().st_size <= MOST_BYTES
    with safe_open(file, framework="pt") as weights:
        large = [name for name in weights.keys() if weights.get_slice(name).get_dtype() != "BF16"]  # noqa: SIM118
    assert [name for name in large if name.endswith("weight")] == []


def test_the_model_is_that_of_its_recipe(loaded: tuple[MorForCausalLM, Any]) -> None:
    model, tokenizer = loaded
    options = recipe("8m-prose").model
    assert {name: getattr(model.config, name) for name in options} == options
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.mean_depth == 2


def test_the_card_tells_the_steps_and_tokens_of_its_recipe() -> None:
    stages = [recipe(name).training for name in ("8m-base", "8m-prose")]
    base, prose = (stage.steps for stage in stages)
    tokens = sum(stage.steps * stage.micro_batch_size * stage.sequence_length for stage in stages)
    assert f"| training | {base:,} + {prose:,} steps of 32 x 512 tokens " in CARD
    assert f"has read {tokens // 10**6}M tokens" in CARD


def test_greedy_text_is_the_same_each_time(loaded: tuple[MorForCausalLM, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    first, again = (model.generate(ids, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape[1] > ids.shape[1]


@pytest.mark.parametrize("mean_depth", [None, 1.3, 2.7])
def test_it_decides_causally(loaded: tuple[MorForCausalLM, Any], mean_depth: float | None) -> None:
    model, tokenizer = loaded
    ids = tokenizer(CARD, return_tensors="pt").input_ids[0, :96]
    found = suffix_probe(model, ids, mean_depth=mean_depth, num_suffixes=32)
    assert found.causal, found


def test_depths_are_those_asked_for(loaded: tuple[MorForCausalLM, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(CARD, return_tensors="pt").input_ids[:, :512]
    shallow, deep = (float(model(ids, mean_depth=depth).depths.float().mean()) for depth in (1.2, 2.8))
    assert 1 <= shallow < deep <= 3


def test_commands_find_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(FOLDER), PROMPT, "--max-new-tokens", "4", "--no-color", "--device", "cpu"]) == 0
    assert main(["show", str(FOLDER), PROMPT, "--no-color", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_card_names_licences_and_real_commands() -> None:
    assert "license: apache-2.0" in CARD and "CC-BY-SA-4.0" in CARD
    assert "not measured yet" not in CARD
    commands = [shlex.split(line) for line in re.findall(r"^    (mor .*)$", CARD, flags=re.MULTILINE)]
    assert {words[1] for words in commands} == {"generate", "show", "serve", "evaluate", "data", "train", "calibrate"}
    for words in commands:
        if words[1] == "train":
            recipe(words[2])


def test_no_folder_of_a_machine_is_named() -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((FOLDER / name).read_text(encoding="utf-8"))
        assert [value for value in settings.values() if isinstance(value, str) and "/" in value] == []
