"""The tables of docs/training.md are what its own program prints, and its measured table is the benchmark's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def table_of(line: str) -> str:
    """The table of the page whose first line begins like `line`."""
    found = re.search(rf"^{re.escape(line)}.*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)
    assert found is not None, f"docs/training.md has no table that begins with {line!r}"
    return found[0].strip()


def test_the_computed_tables_are_the_programs_output(capsys: pytest.CaptureFixture[str]) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(programs) == 1
    exec(compile(programs[0], "docs/training.md", "exec"), {})
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert printed == [table_of("| recipe |"), table_of("| model |")]


def test_the_measured_table_is_that_of_the_file_it_names() -> None:
    copied = re.search(r"<!-- Copied from (\S+);.*?-->(.*?)<!-- End", PAGE, flags=re.DOTALL)
    assert copied is not None
    rows = re.findall(r"^\| (\S+?)[ ,'].*?\|(.*)\|$", copied[2], flags=re.MULTILINE)
    measured = (ROOT / copied[1]).read_text(encoding="utf-8")
    assert len(rows) >= 5
    for name, cells in rows[1:]:
        if name.startswith("---"):
            continue
        values = [cell.strip() for cell in cells.split("|")]
        line = re.search(rf"^\| {re.escape(name)} \|(.*)$", measured, flags=re.MULTILINE)
        assert line is not None, name
        there = [cell.strip().partition(" ")[0] for cell in line[1].split("|")]
        assert values == there[: len(values)], name
