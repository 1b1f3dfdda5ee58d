"""Runs are read from their journals, whatever state they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.show.runs import RUN_COLUMNS, differing_options, is_run, read_runs, run_cells
from tests.show.examples import evaluation_line, training_line, write_run

HEADERS = [column.header for column in RUN_COLUMNS]


def texts(*folders: Path) -> list[dict[str, str]]:
    return [dict(zip(HEADERS, (cell.text for cell in row))) for row in run_cells(read_runs(folders))]


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    lines = [training_line(5), training_line(10), evaluation_line(10), training_line(15), evaluation_line(20, nll=2.5)]
    speeds = [dict(tokens_per_second=speed, mfu=speed / 100) for speed in (1.0, 20.0, 30.0)]
    lines = [line | (speeds.pop(0) if line["kind"] == "training" else {}) for line in lines]
    folder = write_run(tmp_path / "run", *lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "training", "st')  # the run is writing this very moment
    assert texts(folder) == [
        {
            "done": "20%",
            "tokens": "1.5k",
            "FLOPs": "1.5G",
            "NLL": "2.500",
            "bits/byte": "1.250",
            "depth": "1.75",
            "tok/s": "20",
            "MFU": "20%",
            "GiB": "1.5",
        }
    ]


def test_a_run_that_has_just_begun_and_one_of_an_older_kind(tmp_path: Path) -> None:
    begun = write_run(tmp_path / "begun")
    old = training_line(5)
    for key in ("flops", "mfu", "peak_memory_gib"):
        del old[key]
    first, second = texts(begun, write_run(tmp_path / "old", old))
    assert first == dict.fromkeys(HEADERS, "–") | {"done": "0%"}
    assert (second["tok/s"], second["tokens"], second["MFU"], second["FLOPs"], second["GiB"]) == (
        "10",
        "500",
        "–",
        "–",
        "–",
    )


def test_the_best_is_marked_where_comparing_is_fair(tmp_path: Path) -> None:
    better = write_run(tmp_path / "a", training_line(5, mfu=0.5, peak_memory_gib=3.0), evaluation_line(5, nll=2.0))
    worse = write_run(tmp_path / "b", training_line(5), evaluation_line(5))
    marked = [[h for h, cell in zip(HEADERS, row) if cell.best] for row in run_cells(read_runs([better, worse]))]
    assert marked == [["bits/byte", "tok/s", "MFU"], ["tok/s", "GiB"]]
    assert not any(cell.best for cell in run_cells(read_runs([better]))[0])


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("x/mor", "y/mor", "y/vanilla")]
    assert [run.name for run in read_runs(paths[1:])] == ["mor", "vanilla"]
    assert [run.name for run in read_runs(paths)] == ["x/mor", "y/mor", "y/vanilla"]


def test_what_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert is_run(run)
    with pytest.raises(FileNotFoundError, match=r"no such run: .*none"):
        read_runs([run, tmp_path / "none"])
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run: it has no options.json"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"run/\.\./run is given twice"):
        read_runs([run, run / ".." / "run"])
    for text, reason in (("[1]", "attribute"), ("{", "Expecting"), ("{}", "it has no training.steps")):
        (run / "options.json").write_text(text)
        with pytest.raises(ValueError, match=f"options.json holds no options of a run: .*{reason}"):
            read_runs([run])


def test_differing_options(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a")
    other = write_run(tmp_path / "b", options={"model": {"router": "random", "num_recursions": 3}})
    assert differing_options(read_runs([one, other])) == {
        "model.num_recursions": ["–", "3"],
        "model.router": ["none", "random"],
    }
    assert differing_options(read_runs([one])) == {}
