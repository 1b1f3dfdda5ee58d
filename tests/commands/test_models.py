"""Commands on a model: finding it, generate, evaluate, show, calibrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.cli import main
from mor.model.modeling_mor import MorForCausalLM
from tests.commands.running import fails, make_model, works
from tests.show.examples import evaluation_line, training_line, write_run

# Finding models


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such model" in fails(capsys, "generate", tmp_path / "none", "p")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in fails(capsys, "generate", tmp_path / "empty", "p")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama' model; convert it first" in fails(capsys, "generate", tmp_path / "empty", "p")
    (tmp_path / "empty" / "config.json").write_text("[")
    assert "is not a configuration" in fails(capsys, "generate", tmp_path / "empty", "p")


def test_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "damaged" in fails(capsys, "generate", folder, "p")


# generate


def test_generate_writes_the_prompt_and_more(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", model, "def f", "--max-new-tokens", 8, "--seed", 3, "--no-color")
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("def f")
    assert "mean depth" in captured.err
    assert works(capsys, *words) == captured.out
    assert "\x1b" not in captured.out


def test_generate_within_a_budget(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for depth in (1, 3):
        assert main(["generate", str(model), "def f", "--mean-depth", str(depth), "--max-new-tokens", "5"]) == 0
        assert f"mean depth {depth}.00 of 3" in capsys.readouterr().err
    assert "mean_depth=3.5 is impossible" in fails(capsys, "generate", model, "def f", "--mean-depth", 3.5)


def test_generate_refuses_what_cannot_be(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at most 64" in fails(capsys, "generate", model, "x" * 100)
    assert "top_p=2.0" in fails(capsys, "generate", model, "x", "--top-p", 2)


# evaluate


def test_evaluate_names_the_rule_and_probes_first(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = works(capsys, "evaluate", model, "--data", text, "--max-tokens", 1024, "--mean-depth", "1,2,3")
    assert out.startswith("decision: causal\n")
    assert "suffix probe: causal: none of 64" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])]
    assert [row[1] for row in rows][::2] == ["1.00", "3.00"]


def test_evaluate_as_json(model: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(works(capsys, "evaluate", model, "--data", shards, "--max-tokens", 640, "--json"))
    assert found["decision"] == "causal"
    (result,) = found["results"]
    assert result["probe"]["causal"] is True
    assert result["num_tokens"] == 10 * 63
    assert result["perplexity"] > 1
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / 0.6931471805599453, rel=0.05)
    assert sum(result["tokens_by_depth"]) == 640
    words = ("evaluate", model, "--data", shards, "--max-tokens", 640, "--json", "--document-masking")
    masked = json.loads(works(capsys, *words))
    assert masked["document_masking"] and not found["document_masking"]
    assert masked["results"][0]["nll"] != result["nll"]


def test_top_k_is_only_by_name_and_labelled(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = works(capsys, "evaluate", model, "--data", text, "--max-tokens", 1024, "--decision", "top_k")
    assert out.startswith("decision: top_k (top_k looks at later tokens")
    assert "suffix probe: not causal" in out


def test_a_model_that_looks_ahead_is_refused(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MorForCausalLM.forward

    def leaking(self: MorForCausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        options["decision"] = "top_k"
        return forward(self, input_ids, **options)

    monkeypatch.setattr(MorForCausalLM, "forward", leaking)
    line = fails(capsys, "evaluate", model, "--data", text, "--max-tokens", 1024)
    assert "is refused: under decision='causal' it is not causal" in line


def test_evaluate_says_what_is_wrong(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in fails(capsys, "evaluate", model, "--data", tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("x")
    assert "too little text" in fails(capsys, "evaluate", model, "--data", tmp_path / "short.txt")
    (tmp_path / "t.png").write_text("x")
    assert "unsupported suffix" in fails(capsys, "evaluate", model, "--data", tmp_path / "t.png")


def test_models_without_a_router_have_no_budget(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_model(tmp_path / "m", router="none")
    assert "needs a router" in fails(capsys, "evaluate", plain, "--data", text, "--mean-depth", "1.5")
    assert "3.00" in works(capsys, "evaluate", plain, "--data", text, "--max-tokens", 256)


# show, calibrate


def test_show_prints_depths_and_writes_a_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    picture = tmp_path / "picture.svg"
    out = works(capsys, "show", model, "x < y & z", "--no-color", "--html", page, "--svg", picture)
    assert "mean depth" in out
    assert "recursion 3" in out
    assert "₁" in out or "₂" in out or "₃" in out
    html = page.read_text()
    assert "&lt;" in html
    assert 'data-d="' in html
    assert picture.read_text().startswith("<svg")


def test_show_needs_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in fails(capsys, "show", model, "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a` and `b` of runs, and one beside them that is none."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", training_line(50), evaluation_line(50), training_line(100), evaluation_line(100, nll=2.0))
    write_run(folder / "b", training_line(50), evaluation_line(50, nll=1.5))
    (folder / "c").mkdir()
    return folder


def test_show_compares_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "runs.html"
    out = works(capsys, "show", runs / "a", "--no-color", runs / "b", "--out", page)
    assert f"wrote {page}" in out
    assert "\x1b" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["●", "a", "100%", "2.000", "1.000", "1.75", "10", "40%", "1.5"] in rows
    assert ["○", "b", "50%", "1.500", "0.750", "1.75", "10", "40%", "1.5"] in rows
    assert "Held-out text, causal (bits per byte)" in out
    assert "training tokens" in out
    assert "by FLOPs" in page.read_text()


def test_show_one_run_by_time(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = works(capsys, "show", runs / "b", "--by", "time")
    assert "Training loss (nats per token)" in out  # a single evaluation is no curve
    assert "minutes of training" in out


def test_show_tells_runs_from_texts(
    model: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = runs / "a"
    assert "holds no run" in fails(capsys, "show", a, runs / "c")
    assert f"no such run: {runs / 'd'} (a text" in fails(capsys, "show", a, runs / "d")
    assert "no such run: x" in fails(capsys, "show", a, runs / "b", "x")
    assert "no such run: some text" in fails(capsys, "show", a, "some text", "--out", "f")
    assert "no such run: nothing" in fails(capsys, "show", "nothing")
    assert "to show what a model does, give a text too" in fails(capsys, "show", model)
    assert "--html is for a text; runs take --out" in fails(capsys, "show", a, "--html", "f")
    assert "--mean-depth is for a text" in fails(capsys, "show", a, "--mean-depth", 2)
    assert "--by is for runs" in fails(capsys, "show", model, "x", "--by", "time")
    assert "holds no model" in fails(capsys, "show", a, "a text")
    monkeypatch.chdir(runs)
    assert "mean depth" in works(capsys, "show", model, "and/or")


def test_show_takes_options_between_its_words(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mean depth 1.00 of 3" in works(capsys, "show", model, "--mean-depth", 1, "x < y")


def test_calibrate_stores_thresholds(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "m")
    before = MorForCausalLM.from_pretrained(folder).model.recursion.router.calibration_thresholds.clone()
    out = works(capsys, "calibrate", folder, "--data", text, "--tokens", 2048, "--mean-depth", 1.8)
    assert "mean depths 1.00 to 3.00" in out
    after = MorForCausalLM.from_pretrained(folder)
    assert not torch.equal(before, after.model.recursion.router.calibration_thresholds)
    assert after.config.mean_depth == 1.8
    assert (folder / "tokenizer.json").is_file()
    rows = works(capsys, "evaluate", folder, "--data", text, "--max-tokens", 2048).splitlines()
    assert 1.6 < float(next(row.split()[1] for row in rows if row.split()[:1] == ["default"])) < 2.0


def test_calibrate_elsewhere(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    works(capsys, "calibrate", folder, "--data", text, "--tokens", 1024, "--out", tmp_path / "n")
    assert (folder / "model.safetensors").read_bytes() == weights
    works(capsys, "generate", tmp_path / "n", "a", "--max-new-tokens", 2)
    assert "already exists" in fails(capsys, "calibrate", folder, "--data", text, "--out", tmp_path / "n")


def test_calibrate_for_rounded_weights(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "m")
    works(capsys, "calibrate", folder, "--data", text, "--dtype", "bfloat16", "--out", tmp_path / "n")
    half = MorForCausalLM.from_pretrained(tmp_path / "n", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert half.model.recursion.router.calibration_thresholds.dtype == torch.float32
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path / "n", folder)]
    assert sizes[0] < 0.7 * sizes[1]


def test_calibrate_needs_a_router(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_model(tmp_path / "m", router="none")
    assert "no budget to calibrate" in fails(capsys, "calibrate", plain, "--data", text)
