"""The whole demo on a few steps and a small text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mor import demo
from mor.cli import main
from mor.demo import DemoOptions, cut, run_demo, steps_in
from mor.recipes import DEMO_STEPS, demo_run
from tests.show.test_report import Page

SENTENCES = ("the quick brown fox jumps", "over the lazy dog", "and reads {0} lines", "of file {0} at last")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "docs"
    folder.mkdir()
    for index in range(40):
        lines = [f"{line.format(index * 7 + n)} {n}" for n in range(30) for line in SENTENCES]
        (folder / f"{index:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = DemoOptions(
        out=str(folder), steps=3, data=str(text), vocab_size=300, evaluation_tokens=1024, max_new_tokens=8, prompt="the"
    )
    console = Console(file=io.StringIO(), width=100)
    page = run_demo(options, console)
    assert page == folder / "report.html"
    assert isinstance(console.file, io.StringIO)
    return folder, console.file.getvalue()


def test_it_prints_the_comparison_and_a_text(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for expected in (
        "equal training FLOPs",
        "vanilla",
        "recursive",
        "parameters unique",
        "KV/token",
        "causal NLL bits/byte",
        "suffix probe: causal",
        "recursion 3",
        "report.html",
    ):
        assert expected in printed


def test_the_page_has_all_of_it(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    html = (folder / "report.html").read_text()
    page = Page(html)
    text = " ".join(page.text)
    for expected in ("MoR", "vanilla", "recursive", "Loss curves", "Router", "expert-choice", "Hardware", "PyTorch"):
        assert expected.lower() in text.lower()
    assert len(page.of_class("figure")) == 8
    assert page.of_class("given")
    assert not {"src", "href"} & {name for _, attributes in page.elements for name in attributes}


def test_the_twins_differ_in_size_and_cost(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert {entry.name for entry in folder.iterdir()} == {
        "mor",
        "vanilla",
        "recursive",
        "data",
        "report.html",
        "tokens.svg",
    }
    assert all((folder / kind / "final" / "model.safetensors").is_file() for kind in ("mor", "vanilla", "recursive"))


def test_other_commands_take_its_folder(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    assert main(["generate", str(folder), "the", "--max-new-tokens", "3", "--mean-depth", "1.5"]) == 0
    assert main(["show", str(folder), "the dog"]) == 0
    assert main(["evaluate", str(folder), "--data", str(folder / "data"), "--max-tokens", "512"]) == 0
    assert "decision: causal" in capsys.readouterr().out


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--steps", "1"]) == 2
    assert "thesis.tex, which is no demo's" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_documents_are_cut_at_blank_lines() -> None:
    assert list(cut(["aa\n\nbb\n\nc", "d\n\n"], 4)) == ["aa\n\nbb", "c", "d\n\n"]
    assert list(cut(["a\n\n\n\nb\n\nc"], 1)) == ["a", "b", "c"]


def test_steps_fit_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [demo_run(kind, mor_steps=DEMO_STEPS) for kind in ("mor", "vanilla", "recursive")]
    monkeypatch.setattr(demo, "_step_seconds", lambda run: 0.5)
    whole = sum(run.training.steps for run in runs) * 0.5
    assert steps_in(whole, 300) == DEMO_STEPS
    assert steps_in(whole * 10, 300) == DEMO_STEPS
    assert steps_in(whole / 2, 300) == pytest.approx(DEMO_STEPS / 2, rel=0.03)
    assert steps_in(0.1, 300) == 20


def test_the_faster_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before, tried = torch.get_num_threads(), []
    for slow in (1, 4):
        monkeypatch.setattr(demo, "_step_seconds", lambda run, slow=slow: float(torch.get_num_threads() == slow))
        tried.append(demo.fastest_threads(4))
    torch.set_num_threads(before)
    assert tried == [4, 1]


def test_times_are_measured() -> None:
    assert 0 < demo._step_seconds(demo_run("mor", mor_steps=20, vocab_size=300), tries=1) < 30


@pytest.mark.parametrize(("words", "part"), [(("--minutes", "0"), "minutes=0.0"), (("--steps", "0"), "steps=0")])
def test_impossible_requests(words: tuple[str, str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 2
    assert part in capsys.readouterr().err
