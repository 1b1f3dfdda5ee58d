"""Results as they lie in a repository: a file of JSON lines for each study, one a run, without folders of a machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor.files import write_text
from mor.study.grid import Study
from mor.study.places import RUNS
from mor.study.results import Findings, Result, find_results, found_vocabulary, order_of_rows, vocabulary_of
from mor.study.studies import STUDIES

DIGITS = 7
BEFORE = "neighbouring"  # folder of results on neighbouring rows, of studies that were run again in random order


def read_place(place: Path) -> dict[str, Findings]:
    """What there is of every study, by name: in a folder of studies, or in a folder of stored results.

    Raises ValueError for stored results of cells that a study no longer has, and of both orders of rows in one file.
    """
    if (place / RUNS).is_dir():
        vocabulary = found_vocabulary(place)
        return {name: find_results(function(vocabulary), place) for name, function in STUDIES.items()}
    return {name: _read_study(place, name) for name in STUDIES}


def store(findings: Sequence[Findings], folder: Path) -> list[Path]:
    """Write NAME.jsonl for each study that has results, and those from before into a folder of their own; what is
    stored of other studies stays."""
    return [
        _write_file(place / f"{each.study.name}.jsonl", results)
        for each in findings
        for place, results in ((folder, each.results), (folder / BEFORE, each.before))
        if results
    ]


def _write_file(file: Path, results: Sequence[Result]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_stored(result), separators=(",", ":"), allow_nan=False) for result in results]
    write_text(file, "".join(line + "\n" for line in lines))
    return file


def _read_study(folder: Path, name: str) -> Findings:
    files = [place / f"{name}.jsonl" for place in (folder, folder / BEFORE)]
    results, before = ([*_lines(file)] for file in files)
    of = STUDIES[name](vocabulary_of([*results, *before]))
    return Findings(study=of, results=_in_order(files[0], results, of), before=_in_order(files[1], before, of))


def _lines(file: Path) -> list[Result]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _in_order(file: Path, results: list[Result], of: Study) -> tuple[Result, ...]:
    """In that of the grid."""
    if len(orders := {order_of_rows(result) for result in results}) > 1:
        raise ValueError(f"{file} holds runs on rows in {len(orders)} orders, which cannot be compared")
    place = {(run.arm, run.budget, run.seed): number for number, run in enumerate(of.runs)}
    cells = [(result["arm"], result["budget"], result["seed"]) for result in results]
    if strange := [cell for cell in cells if cell not in place]:
        raise ValueError(
            f"{file} holds {strange[0]}, which is no cell of the study {of.name!r}; store its results again"
        )
    return tuple(result for _, result in sorted(zip(cells, results, strict=True), key=lambda pair: place[pair[0]]))


def _stored(result: Result) -> Result:
    """Names instead of paths, and numbers of seven digits."""
    command = shlex.join(_without_folders(shlex.split(result["provenance"]["command"])))
    changed = {
        "provenance": {**result["provenance"], "command": command},
        "options": _without_folders(result["options"]),
    }
    return _rounded({**result, **changed})


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    option, sign, path = value.rpartition("=")
    return option + sign + Path(path).name if "/" in path else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
