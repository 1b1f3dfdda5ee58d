"""Data sets that the library `datasets` wrote with `save_to_disk`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor.data.listing import summarise
from mor.data.readers import checked_text
from mor.data.stream import DocumentStream, Position

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_ROWS = 256


def import_datasets(purpose: str) -> Any:
    """The library `datasets`. ImportError saying how to install it for `purpose`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{purpose} needs the library datasets: pip install 'mor[hub]'") from error
    return datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` made `folder`, of one split or of several."""
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


class SavedDataset:
    """One text column of a saved data set, read through a memory map.

    Raises ValueError as soon as it is built for a split or a column that is not there (`split=None`: "train" where
    there are several), or a folder that cannot be read.
    """

    def __init__(self, folder: str | Path, *, column: str = "text", split: str | None = None) -> None:
        self.folder = _split_folder(Path(folder), split)
        self.column = column
        self.rows = _load(self.folder)
        if column not in self.rows.column_names:
            names = ", ".join(map(repr, self.rows.column_names))
            raise ValueError(f"{self.folder}: no column {column!r}; the data set has {names}")

    def describe(self) -> dict[str, Any]:
        """Names, sizes and times of change of the files, summed up, and the column."""
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        return {"kind": "saved data set", **summarise(self.folder, files), "column": self.column}

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The column's values in order. Raises ValueError naming a row that is not text."""
        return SavedStream(self, 0 if position is None else int(position["row"]))


class SavedStream:
    """The documents of a `SavedDataset` from a row on."""

    def __init__(self, source: SavedDataset, row: int) -> None:
        self._source = source
        self._row = row
        self._texts = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._texts)

    def position(self) -> Position | None:
        return {"row": self._row}

    def share(self) -> float | None:
        return self._row / max(1, len(self._source.rows))

    def _read(self) -> Iterator[str]:
        source = self._source
        rows = source.rows.select_columns([source.column])
        for first in range(self._row, len(rows), _ROWS):
            for value in rows[first : first + _ROWS][source.column]:
                text = checked_text(value, source.column, f"{source.folder} row {self._row}")
                self._row += 1
                yield text


def _split_folder(folder: Path, split: str | None) -> Path:
    if not (folder / _SPLITS).is_file():
        if split is not None:
            raise ValueError(f"{folder} has no splits to choose {split!r} from")
        return folder
    chosen = folder / (split or "train")
    if not (chosen / _STATE).is_file():
        splits = ", ".join(sorted(repr(path.parent.name) for path in folder.glob(f"*/{_STATE}")))
        raise ValueError(f"{folder} has no split {chosen.name!r}; it has {splits or 'none'}: choose one with ?split=")
    return chosen


def _load(folder: Path) -> Any:
    datasets = import_datasets(f"reading {folder}")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged Arrow files raise errors of several libraries
        raise ValueError(f"{folder} cannot be read as a saved data set: {error}") from error
