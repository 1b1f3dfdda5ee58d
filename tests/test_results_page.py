"""docs/results.md quotes the tables that the stored results make, and docs/results holds what they make."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mor.study.claims import claims
from mor.study.report import quote, write_report
from mor.study.results import Findings
from mor.study.stored import read_place

ROOT = Path(__file__).parent.parent
STORED, OUT, PAGE = ROOT / "bench" / "results" / "studies", ROOT / "docs" / "results", ROOT / "docs" / "results.md"
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def found() -> dict[str, Findings]:
    return read_place(STORED)


def test_the_page_quotes_what_the_stored_results_make(found: dict[str, Findings]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert quote(page, found, OUT.name) == page, "`mor results` quotes the tables again"


def test_tables_and_figures_are_those_of_the_stored_results(found: dict[str, Findings], tmp_path: Path) -> None:
    write_report(found, tmp_path)
    made, there = (
        {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.iterdir())} for folder in (tmp_path, OUT)
    )
    assert made.keys() == there.keys()
    assert [name for name, text in made.items() if text != there[name]] == [], "`mor results` writes them again"


def test_every_claim_has_a_section_and_its_figures(found: dict[str, Findings]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^## (\d+\. .*)$", page, flags=re.MULTILINE)
    assert titles == [claim.title for claim in claims(found) if claim.title[0].isdigit()]
    assert len(re.findall(r"^\*\*Verdict\.\*\* ", page, flags=re.MULTILINE)) == len(titles)


def test_stored_results_are_small_and_name_no_folder() -> None:
    files = sorted(STORED.rglob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    for line in (line for file in files for line in file.read_text(encoding="utf-8").splitlines()):
        result = json.loads(line)
        words = [*shlex.split(result["provenance"]["command"]), *strings(result["options"])]
        assert [word for word in words if "/" in word] == []


def strings(value: object) -> list[str]:
    """All strings in JSON."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
    return [value] if isinstance(value, str) else []
