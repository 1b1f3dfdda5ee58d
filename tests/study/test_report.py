"""One command makes every table and figure from stored results, and pages quote the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.cli import main
from mor.study.claims import claims
from mor.study.report import quote, write_report
from mor.study.stored import store
from mor.study.studies import study
from tests.study.made_up import everything, nothing, put


def test_the_report_has_all_tables_and_figures(tmp_path: Path) -> None:
    found = everything()
    (tmp_path / "old.svg").write_text("of results that are gone")
    text = write_report(found, tmp_path).read_text()
    for claim in claims(found):
        assert f"## {claim.title}\n" in text
        for table in claim.tables:
            assert table.text in text
    figures = {path.name for path in tmp_path.glob("*.svg")}
    assert figures == {f"{name}.svg" for claim in claims(found) for name in claim.figures}
    for name in figures:
        assert f"]({name})" in text
    assert "- command: `mor study example" in text


def test_what_has_no_results_is_left_out(tmp_path: Path) -> None:
    found = {**nothing(), "gaps": everything()["gaps"]}
    text = write_report(found, tmp_path).read_text()
    assert "## 10. The causal gap" in text and "## 1. Twins" not in text


def test_tables_have_names_of_their_own() -> None:
    names = [table.name for claim in claims(nothing()) for table in claim.tables]
    assert len(set(names)) == len(names)


def block(what: str, text: str = "") -> str:
    return f"<!-- {what} -->\n{text}\n<!-- end -->\n"


def test_pages_quote_tables_and_figures() -> None:
    page = f"before\n{block('table: gaps', 'old')}after\n{block('table: twins')}{block('figure: dial', 'old')}"
    found = {**nothing(), "gaps": everything()["gaps"]}
    quoted = quote(page, found, "results")
    assert quoted.startswith("before\n<!-- table: gaps -->\n\n| arm |")
    assert "\n<!-- end -->\nafter\n" + block("table: twins", "\n*No results yet.*\n") in quoted
    assert quoted.endswith("<!-- figure: dial -->\n\n\n<!-- end -->\n")
    assert quote(quoted, found, "results") == quoted
    assert "\n![dial](results/dial.svg)\n" in quote(page, everything(), "results")
    with pytest.raises(ValueError, match="quotes 'table: gap'; there are table: twins, "):
        quote(block("table: gap"), found, "results")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, stored, out, page = (tmp_path / name for name in ("studies", "stored", "results", "results.md"))
    page.write_text(block("table: smoke"))
    put(study("smoke", 512), runs)
    words = ["results", str(runs), "--store", str(stored), "--out", str(out)]
    assert main(words) == 0
    assert (stored / "smoke.jsonl").is_file()
    assert "| mor-3 |" in page.read_text()
    written = {path.name: path.read_text() for path in out.iterdir()}
    assert main(["results", str(stored), "--out", str(out)]) == 0
    assert {path.name: path.read_text() for path in out.iterdir()} == written
    capsys.readouterr()
    assert main(["results", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "holds no results of studies" in capsys.readouterr().err


def test_the_command_stores_the_studies_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of several studies leaves parts of others in a folder: what is stored of those stays whole."""
    runs, stored = tmp_path / "studies", tmp_path / "stored"
    store(list(everything().values()), stored)
    there = {path.name: path.read_text() for path in stored.glob("*.jsonl")}
    put(study("twins", 512), runs, lambda run: 2.0)
    words = ["results", str(runs), "--store", str(stored), "--out", str(tmp_path / "out")]
    assert main([*words, "--only", "twins"]) == 0
    changed = [path.name for path in stored.glob("*.jsonl") if path.read_text() != there[path.name]]
    assert changed == ["twins.jsonl"]
    capsys.readouterr()
    assert main([*words, "--only", "twins,gasp"]) == 2
    assert "--only gasp: no results of such a study; there are results of twins, " in capsys.readouterr().err
    assert main(["results", str(runs), "--only", "twins"]) == 2
    assert "give --store DIR" in capsys.readouterr().err


def test_stored_results_alone_decide(tmp_path: Path) -> None:
    """The same files, whatever order the results were written in."""
    found = everything()
    store(list(reversed(found.values())), tmp_path / "one")
    store(list(found.values()), tmp_path / "two")
    one, two = tmp_path / "one", tmp_path / "two"
    files = [path.relative_to(one) for path in one.rglob("*.jsonl")]
    assert len(files) == len(found) + 1
    for path in files:
        assert (one / path).read_text() == (two / path).read_text()
