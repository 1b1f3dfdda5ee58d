"""The `mor` command: exit codes, one-line errors, and every sub-command on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mor import __version__
from mor.cli import COMMANDS, main
from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from mor.model.calibrate import calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.quiet import without_progress_bars
from tests.show.examples import evaluation_line, training_line, write_run

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * 7} lazy dogs.\n\n" for i in range(200))


def make_model(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_recursions": 3, "sharing": "middle_cycle", "router": "expert_choice"}
    config = MorConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=256,
        **shape | options,
    )
    model = MorForCausalLM(config).eval()
    if options.get("router") != "none":
        calibrate(model, [torch.randint(257, (16, 64))])
    with without_progress_bars():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    write_shards(TEXT.split("\n\n"), byte_tokenizer(), folder, validation_fraction=0.2)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """The one line of standard error of a command that must fail."""
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def works(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard output of a command that must succeed."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


# The command itself


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--help",), ("help",)):
        out = works(capsys, *words)
        assert all(name in out and command.summary in out for name, command in COMMANDS.items())
    assert works(capsys, "--version") == f"mor {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"usage: mor {name}" in works(capsys, name, "--help")


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mor.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['evaluate', '--help'], ['demo', '--help']): main(words)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'numpy', 'yaml')))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "mor", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mor: unknown command 'nonsense'; did you mean")


@pytest.mark.parametrize(("wrong", "right"), [("evalute", "evaluate"), ("gen", "generate"), ("recipe", "recipes")])
def test_unknown_command_suggests_the_nearest(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean {right!r}?" in fails(capsys, wrong)


def test_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "generate", "m", "p", "--temprature=1")
    assert "'--temprature=1'; did you mean '--temperature'?" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("generate", "m"), "required: PROMPT"),
        (("evaluate", "m"), "required: --data"),
        (("evaluate", "m", "--data", "d", "--decision", "best"), "invalid choice: 'best'"),
        (("evaluate", "m", "--data", "d", "--mean-depth", "1,x"), "'1,x' is not a list of numbers"),
        (("generate", "m", "p", "--seed", "x"), "invalid int value: 'x'"),
        (("data",), "required"),
        (("convert", "a", "b"), "required: --from"),
    ],
)
def test_wrong_words_are_one_line(words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in fails(capsys, *words)


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("a=1\n  is wrong"), 2, "mor: a=1 is wrong"),
        (FileNotFoundError("no such thing"), 2, "no such thing"),
        (OSError(28, "No space left on device", "f"), 2, "mor: No space left on device: f"),
        (ImportError("needs pyarrow"), 2, "needs pyarrow"),
        (RuntimeError("diverged"), 1, "diverged"),
        (FloatingPointError("loss is nan"), 1, "loss is nan"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr("mor.commands.recipes.run", run)
    assert part in fails(capsys, "recipes", code=code)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("mor.commands.recipes.run", run)
    with pytest.raises(AssertionError, match="ours"):
        main(["recipes"])


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def run(_: object) -> None:
        warnings.warn("mind the\n gap", stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr("mor.commands.recipes.run", run)
    assert main(["recipes"]) == 0
    assert capsys.readouterr().err == "mor: warning: mind the gap\n"


def test_a_closed_pipe_is_no_accident(model: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m mor recipes 360m-mor-3 | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


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
