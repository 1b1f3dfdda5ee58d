"""Commands that make something: data, recipes, convert, train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mor.cli import main
from mor.data.tokenizer import byte_tokenizer
from mor.quiet import without_progress_bars
from tests.commands.running import TEXT, fails, works

# data, recipes


def test_data_build_inspect_and_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, folder = tmp_path / "bpe", tmp_path / "shards"
    assert "280 tokens" in works(capsys, "data", "tokenizer", text, tokenizer, "--vocab-size", 280)
    assert "already exists" in fails(capsys, "data", "tokenizer", text, tokenizer)
    (tmp_path / "docs").mkdir()
    for index in range(30):
        (tmp_path / "docs" / f"{index}.txt").write_text(f"document {index}\n" + TEXT[index * 50 : index * 50 + 200])
    build = ("data", "build", tmp_path / "docs", folder, "--tokenizer", tokenizer, "--validation-fraction", 0.2)
    out = works(capsys, *build)
    assert "train" in out
    assert "validation" in out
    out = works(capsys, "data", "inspect", folder, "--verify", "--documents", 1)
    assert "every file is as it was written" in out
    assert "train document 0: 'document" in out
    damaged = next(folder.glob("train-*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert "truncated" in fails(capsys, "data", "inspect", folder)
    assert "no token shards" in fails(capsys, "data", "inspect", tmp_path)


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    out = works(capsys, "recipes")
    assert "360m-mor-3-shared" in out
    assert "14,672" in out
    assert "num_hidden_layers: 34" in works(capsys, "recipes", "360m-mor-4")
    assert "did you mean" in fails(capsys, "recipes", "361m")


# convert


def test_convert_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with without_progress_bars():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(str(tmp_path / "llama"))
    out = works(
        capsys,
        *("convert", "--from", "llama", tmp_path / "llama", tmp_path / "mor", "--num-recursions", 3),
        *("--sharing", "middle_cycle", "--initialization", "average", "--router", "expert_choice"),
        *("--kv-cache", "shared"),
    )
    assert "4 unique layers applied as 8 (middle_cycle)" in out
    assert "router expert_choice, KV cache shared" in out
    works(capsys, "generate", tmp_path / "mor", "a", "--max-new-tokens", 3)
    assert "exists" in fails(capsys, "convert", "--from", "llama", tmp_path / "llama", tmp_path / "mor")


def test_convert_refuses_mixed_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--untied does not apply" in fails(capsys, "convert", "--from", "llama", "a", "b", "--untied", "first")
    assert "--router does not apply" in fails(
        capsys, "convert", "--from", "official", "a", "b", "c", "--router", "none"
    )
    assert "takes CONFIG.yaml WEIGHTS OUT; got 2" in fails(capsys, "convert", "--from", "official", "a", "b")
    assert "takes SRC OUT; got 3" in fails(capsys, "convert", "--from", "llama", "a", "b", "c")
    assert "not a folder" in fails(capsys, "convert", "--from", "llama", tmp_path / "none", tmp_path / "out")


# train


TINY = (
    "--model.hidden_size=16",
    "--model.intermediate_size=32",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--training.steps=4",
    "--training.micro_batch_size=2",
    "--training.sequence_length=32",
    "--training.log_interval=2",
    "--training.evaluation_interval=0",
    "--training.evaluation_tokens=64",
    "--training.calibration_tokens=64",
    "--training.checkpoint_interval=2",
    "--training.device=cpu",
    "--schedule.warmup_steps=1",
    "--schedule.decay_steps=1",
)


def test_train_from_text_then_resume_and_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": f"{i} {TEXT[i : i + 150]}"}) + "\n" for i in range(60)))
    run = tmp_path / "run"
    command = ("train", "demo", "--data", docs, "--tokenizer", "bpe:270", "--out", run, *TINY)
    assert "finished 4 steps" in works(capsys, *command)
    assert (tmp_path / "run-data" / "manifest.json").is_file()
    assert "already holds a run" in fails(capsys, *command)
    assert "finished 4 steps" in works(capsys, "train", "--resume", "--out", run)
    assert works(capsys, "generate", run, "the", "--max-new-tokens", 3)
    (run / "final").rename(tmp_path / "moved")
    assert works(capsys, "generate", run, "the", "--max-new-tokens", 3)  # from the newest checkpoint


def test_train_from_an_options_file(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tmp_path / "o.yaml"
    options.write_text(f"output: {tmp_path / 'run'}\nmodel: {{num_hidden_layers: 2}}\ndata: {{path: {shards}}}\n")
    assert "finished 4 steps" in works(capsys, "train", "--options", options, *TINY)
    options.write_text("outptu: x\n")
    assert "did you mean 'output'?" in fails(capsys, "train", "--options", options)


def test_train_says_what_is_missing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name of a recipe" in fails(capsys, "train")
    assert "did you mean '360m-mor-3'" in fails(capsys, "train", "360m-mor3")
    assert "give --data PATH" in fails(capsys, "train", "360m-mor-3")
    assert "not both" in fails(capsys, "train", "demo", "--options", "o.yaml")
    assert "no run to resume" in fails(capsys, "train", "--resume", "--out", tmp_path)
    assert "unknown option 'training.step'" in fails(capsys, "train", "360m-mor-3", "--training.step=3")
    (tmp_path / "t.txt").write_text(TEXT)
    words = ("train", "360m-mor-3", "--data", tmp_path / "t.txt", "--tokenizer", "bpe:x", "--out", tmp_path / "r")
    assert "expected bpe:SIZE" in fails(capsys, *words)
    wrong = fails(capsys, "train", "360m-mor-3", "--data", shards, "--out", tmp_path / "r", "--model.hiden_size=3")
    assert "hidden_size" in wrong


def test_an_interrupted_run_says_how_to_go_on(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mor.train.loop import TrainResult

    stopped = TrainResult(folder=tmp_path / "r", step=7, interrupted=True, model=None, training=None, evaluation=None)
    monkeypatch.setattr("mor.train.loop.train", lambda options, resume: stopped)
    assert main(["train", "demo", "--data", str(shards), "--out", str(tmp_path / "r")]) == 130
    assert f"mor train --resume --out {tmp_path / 'r'}" in capsys.readouterr().out
