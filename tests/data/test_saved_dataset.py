"""Data sets written by `save_to_disk` are read in order, from any row on."""

import json
from pathlib import Path
from typing import Any

import pytest

from mor.data.saved_dataset import SavedDataset
from mor.data.sources import open_source

datasets = pytest.importorskip("datasets")

TEXTS = [f"text {i}" for i in range(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one data set of the split "all" and one of the splits "train" and "test"."""
    root = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(600))})
    datasets.disable_progress_bars()
    rows.save_to_disk(root / "one", num_shards=3)
    datasets.DatasetDict(train=rows, test=rows.select(range(5))).save_to_disk(root / "many")
    datasets.enable_progress_bars()
    return root


def test_rows_come_in_order(folder: Path):
    source = open_source(folder / "one")
    assert isinstance(source, SavedDataset)
    assert list(source.documents()) == TEXTS
    assert list(open_source(folder / "many").documents()) == TEXTS
    assert list(open_source(f"{folder}/many?split=test").documents()) == TEXTS[:5]


def test_every_row_can_be_entered(folder: Path):
    source = open_source(folder / "one")
    stream = source.documents()
    for given in range(300):
        if given % 50 == 0:
            assert stream.share() == given / 600
            assert list(source.documents(json.loads(json.dumps(stream.position())))) == TEXTS[given:]
        next(stream)


def test_descriptions_differ(folder: Path):
    one, two = (open_source(f"{folder}/many?split={split}").describe() for split in ("train", "test"))
    assert one != two
    assert json.loads(json.dumps(one)) == one


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("many?split=dev", r"has no split 'dev'; it has 'test', 'train'"),
        ("one?split=dev", r"has no splits to choose 'dev' from"),
        ("one?column=body", r"no column 'body'; the data set has 'text', 'id'"),
    ],
)
def test_what_is_not_there(folder: Path, address: str, message: str):
    with pytest.raises(ValueError, match=message):
        open_source(f"{folder}/{address}")


def test_a_column_without_text(folder: Path):
    with pytest.raises(ValueError, match=r"one row 0: field 'id' holds 0 \(int\); expected text"):
        next(open_source(f"{folder}/one?column=id").documents())


def test_a_damaged_folder(folder: Path, tmp_path: Path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a saved data set"):
        open_source(tmp_path)


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    missing: Any = None
    monkeypatch.setitem(sys.modules, "datasets", missing)
    with pytest.raises(ImportError, match=r"needs the library datasets: pip install 'mor\[hub\]'"):
        open_source(folder / "one")
