"""`mor evaluate` with domains, parts, the gap and tasks, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from mor.data.tokenizer import byte_tokenizer
from mor.quiet import without_progress_bars
from tests.evaluate.models import calibrated
from tests.evaluate.test_suite import DOCUMENTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and, as `text.jsonl`, documents of two kinds."""
    place = tmp_path_factory.mktemp("evaluate")
    with without_progress_bars():
        calibrated(vocab_size=257, eos_token_id=256, max_position_embeddings=128).save_pretrained(place / "m")
    byte_tokenizer().save_pretrained(str(place / "m"))
    lines = (json.dumps({"text": text, "kind": ("odd", "even")[n % 2]}) for n, text in enumerate(DOCUMENTS))
    (place / "text.jsonl").write_text("\n".join(lines))
    return place


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = main(["evaluate", str(folder / "m"), "--probe-suffixes", "8", "--device", "cpu", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def complaint(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["evaluate", str(folder / "m"), "--device", "cpu", *map(str, words)]) == 2
    return capsys.readouterr().err


def strict(text: str) -> Any:
    """JSON without NaN, which it does not have."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_json_has_all_parts_and_the_gap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", folder / "text.jsonl", "--domain-field", "kind", "--mean-depth", "1.5,2", "--gap", "--json")
    found = strict(evaluate(folder, capsys, *words))
    assert [result["requested"] for result in found["results"]] == [1.5, 2.0]
    for result in found["results"]:
        assert {part["name"] for part in result["by"]["domain"]} == {"odd", "even"}
        for parts in result["by"].values():
            assert sum(part["num_tokens"] for part in parts) == result["num_tokens"]
        low, high = result["perplexity_95"]
        assert low < result["perplexity"] < high
        assert result["gap"]["nll"] != 0
        assert result["probe"]["causal"] is True
        assert result["num_documents"] >= 12


def test_one_document_is_valid_json_without_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("the same words " * 40)
    found = strict(evaluate(folder, capsys, "--data", tmp_path / "one.txt", "--json"))
    assert found["results"][0]["nll_error"] is None
    assert "needs two of them" in evaluate(folder, capsys, "--data", tmp_path / "one.txt")


def test_tables_fit_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", folder / "text.jsonl", "--domain-field", "kind", "--mean-depth", "1.5,2", "--gap")
    out = evaluate(folder, capsys, *words, "--by", "position,depth,domain")
    assert "…" not in out
    assert "causal gap at 1.5: NLL " in out and "causal gap at 2: NLL " in out
    for name in ("depth 3", "64-127", "even"):
        assert any(line.split("  ")[0].strip() == name for line in out.splitlines()), name


def test_several_places_are_compared_without_being_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("x y z " * 200)
    out = evaluate(folder, capsys, "--data", folder / "text.jsonl", tmp_path / "other.txt")
    assert " other " in out and " text " in out


def test_a_page_is_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(folder, capsys, "--data", folder / "text.jsonl", "--mean-depth", "2", "--page", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert page.count("<h2>") == 5 and "inside a word" in page


def test_built_in_tasks_from_both_backends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", folder / "text.jsonl", "--tasks", "cloze,agreement", "--limit", "5", "--json")
    ours, engine = (strict(evaluate(folder, capsys, *words, "--backend", name)) for name in ("model", "engine"))
    assert ours["tasks"] == engine["tasks"]
    assert {name: task["items"] for name, task in ours["tasks"].items()} == {"cloze": 5, "agreement": 5}
    assert "guessing" in evaluate(folder, capsys, *words[:-1])


def test_what_does_not_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: --data PATH, or --tasks" in complaint(folder, capsys)
    assert "give it with --data" in complaint(folder, capsys, "--tasks", "cloze")
    text = folder / "text.jsonl"
    assert "'size' is not one of" in complaint(folder, capsys, "--data", text, "--by", "size")
    assert "one budget" in complaint(folder, capsys, "--data", text, "--tasks", "cloze", "--mean-depth", "1,2")
    assert "no field 'nothing'" in complaint(folder, capsys, "--data", text, "--domain-field", "nothing")
