"""Stored results: all that tables need, nothing of the machine's folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mor.study.grid import only
from mor.study.stored import BEFORE, read_place, store
from mor.study.studies import study
from tests.study.made_up import everything, findings, put


def test_stored_results_are_read_as_they_were(tmp_path: Path) -> None:
    found = everything()
    files = store(list(found.values()), tmp_path)
    assert [file.stem for file in files if file.parent == tmp_path] == list(found)
    assert [file for file in files if file.parent != tmp_path] == [tmp_path / BEFORE / "twins.jsonl"]
    again = read_place(tmp_path)
    for name, each in found.items():
        assert again[name].study == each.study
        assert [r["key"] for r in again[name].results] == [r["key"] for r in each.results]
        assert [r["version"] for r in again[name].before] == [r["version"] for r in each.before]
        assert again[name].results[0]["own"]["nll"] == pytest.approx(each.results[0]["own"]["nll"], rel=1e-6)


def test_paths_stay_at_home(tmp_path: Path) -> None:
    (file,) = store([findings(study("smoke", 512))], tmp_path)
    text = file.read_text()
    assert "/somewhere" not in text and "on this machine" not in text
    line = json.loads(text.splitlines()[0])
    assert line["provenance"]["command"] == "mor study example --data shards --out=studies"
    assert line["options"]["data"]["path"] == "shards"
    assert line["options"]["training"]["steps"] == 12


def test_a_folder_of_studies_is_read_too_and_what_has_no_result_stays_stored(tmp_path: Path) -> None:
    runs, stored = tmp_path / "studies", tmp_path / "stored"
    store([findings(study("smoke", 512)), findings(study("gaps", 512))], stored)
    put(study("smoke", 512), runs, runs=study("smoke", 512).runs[:2])
    found = read_place(runs)
    assert len(found["smoke"].results) == 2 and not found["gaps"].results
    store(list(found.values()), stored)
    again = read_place(stored)
    assert (len(again["smoke"].results), len(again["gaps"].results)) == (2, len(study("gaps", 512).runs))
    assert not any(each.results for each in read_place(tmp_path / "nowhere").values())


def test_cells_that_are_no_more_are_named(tmp_path: Path) -> None:
    small = only(study("smoke", 512), seeds=[0])
    (file,) = store([findings(small)], tmp_path)
    file.write_text(file.read_text().replace('"arm":"mor-3"', '"arm":"mor-7"'))
    with pytest.raises(ValueError, match=r"holds \('mor-7', 'tiny', 0\), which is no cell of the study 'smoke'"):
        read_place(tmp_path)


def test_orders_of_rows_are_not_mixed_in_a_file(tmp_path: Path) -> None:
    twins = everything()["twins"]
    mixed = (*twins.results[:2], *twins.before[2:])
    store([dataclasses.replace(twins, results=mixed)], tmp_path)
    with pytest.raises(ValueError, match=r"twins\.jsonl holds runs on rows in 2 orders, which cannot be compared"):
        read_place(tmp_path)
