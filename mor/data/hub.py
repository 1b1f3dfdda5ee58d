"""Data sets of the Hugging Face hub, streamed: nothing is downloaded but what is read, and nothing is kept on the disk.

`hf://NAME[:CONFIG][?split=...&column=...&revision=...]`, for example
`hf://HuggingFaceTB/smollm-corpus:fineweb-edu-dedup?split=train&column=text`. A name that begins with `/` or `.` is a
folder on this machine that `datasets.load_dataset` can read.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mor.data.address import split_options
from mor.data.listing import summarise
from mor.data.readers import checked_text
from mor.data.saved_dataset import import_datasets
from mor.data.stream import DocumentStream, Position

HUB_PREFIX = "hf://"
ATTEMPTS = 8
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_PASSING_STATUS = (408, 425, 429)  # timeout, too early, too many requests


class HubSource:
    """One text column of one split of a data set. Building it reads nothing; ValueError for a malformed `address`.

    `column` is the default where the address names none; the default of `split` is "train". After a lost connection
    the stream goes on at the next document, trying `ATTEMPTS` times with waits that double from a second to a minute.
    """

    def __init__(self, address: str, *, column: str = "text", sleep: Callable[[float], None] = time.sleep) -> None:
        place, options = split_options(address.removeprefix(HUB_PREFIX), ("split", "column", "revision"))
        self.address = address
        self.name, colon, self.config = place.partition(":")
        if not self.name or (colon and not self.config):
            raise ValueError(f"{address}: expected {HUB_PREFIX}NAME, or {HUB_PREFIX}NAME:CONFIG")
        self.split = options.get("split", "train")
        self.column = options.get("column", column)
        self.revision = options.get("revision")
        self.sleep = sleep

    @property
    def is_local(self) -> bool:
        """Whether the name is that of a folder on this machine."""
        return self.name.startswith(("/", "."))

    def describe(self) -> dict[str, Any]:
        """The address by its parts, and for a local folder its files. The hub is not asked: pin it with `revision`."""
        parts = {"config": self.config or None, "split": self.split, "column": self.column, "revision": self.revision}
        if not self.is_local:
            return {"kind": "hub", "name": self.name, **parts}
        files = sorted(file for file in Path(self.name).rglob("*") if file.is_file())
        return {"kind": "local data set", **summarise(Path(self.name), files), **parts}

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The column's values in order.

        Reading raises ConnectionError when the hub stays out of reach, FileNotFoundError for an unknown data set,
        ValueError for an unknown configuration, split or column, and naming the document that cannot be read.
        """
        return HubStream(self, position)

    def resolve(self) -> str | None:
        """The commit that the revision stands for now, so that one build never mixes two; None for a local folder."""
        if self.is_local:
            return None
        from huggingface_hub import HfApi

        return HfApi().dataset_info(self.name, revision=self.revision).sha

    def load(self, commit: str | None) -> Any:
        """The split at `commit` as an `IterableDataset`. Raises ValueError when it has no such column."""
        datasets = import_datasets(f"streaming {self.address}")
        if self.is_local and not Path(self.name).exists():
            raise FileNotFoundError(f"{self.address}: no such folder")
        rows = datasets.load_dataset(self.name, self.config or None, split=self.split, revision=commit, streaming=True)
        names = rows.column_names
        if names is not None and self.column not in names:
            raise ValueError(f"no column {self.column!r}; the data set has {', '.join(map(repr, names))}")
        return rows if names is None else rows.select_columns([self.column])


class HubStream:
    """The documents of a `HubSource`; a position is the commit, the library's own state, and a count."""

    def __init__(self, source: HubSource, position: Position | None) -> None:
        self._source = source
        self._commit: str | None = position["commit"] if position else None
        self._state: Any = position["state"] if position else None
        self._given: int = position["documents"] if position else 0
        self._total: int | None = None
        self._rows: Any = None
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        row = self._next_row()
        column, place = self._source.column, f"{self._source.address}: document {self._given}"
        if column not in row:
            raise ValueError(f"{place}: no column {column!r}; the data set has {', '.join(map(repr, row))}")
        text = checked_text(row[column], column, place)
        self._given += 1
        self._state = self._rows.state_dict()
        return text

    def position(self) -> Position | None:
        return {"commit": self._commit, "documents": self._given, "state": self._state}

    def share(self) -> float | None:
        return min(1.0, self._given / self._total) if self._total else None

    def _next_row(self) -> dict[str, Any]:
        wait = _FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._iterator is None:
                    self._open()
                assert self._iterator is not None
                return next(self._iterator)
            except (StopIteration, ImportError):
                raise
            except Exception as error:  # file systems and formats each raise their own
                self._iterator = None
                if not is_connection_error(error):
                    raise self._explained(error) from error
                if attempt == ATTEMPTS or _is_offline(error):
                    raise self._unreachable(error) from error
                _warn(f"{self._source.address}: no connection at document {self._given}; next try in {wait:.0f} s")
            self._source.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    def _open(self) -> None:
        if self._commit is None:
            self._commit = self._source.resolve()
        self._rows = self._source.load(self._commit)
        self._total = _num_rows(self._rows, self._source.split)
        if self._state is not None:
            self._rows.load_state_dict(self._state)
        self._iterator = iter(self._rows)

    def _explained(self, error: Exception) -> Exception:
        """`error` as one of a kind that commands report in one line, with the address in it."""
        address = self._source.address
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{address} was not found, or is private: {error}")
        place = f"{address}, after document {self._given}" if self._given else address
        return ValueError(f"{place}: {error}")

    def _unreachable(self, error: Exception) -> ConnectionError:
        address = self._source.address
        if _is_offline(error):
            return ConnectionError(f"{address}: HF_HUB_OFFLINE forbids to reach the hub; unset it or give local files")
        message = f"{address}: the hub could not be reached in {ATTEMPTS} attempts ({error}); check the connection"
        return ConnectionError(f"{message}, or give local files")


def is_connection_error(error: Exception) -> bool:
    """Whether trying again later may help: no connection, a timeout, or a server that is busy or failing."""
    from datasets.utils import file_utils
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status in _PASSING_STATUS or status >= 500
    others = getattr(file_utils, "CONNECTION_ERRORS_TO_RETRY", ())
    return isinstance(error, (ConnectionError, TimeoutError, *others))


def _is_offline(error: BaseException | None) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def _num_rows(rows: Any, split: str) -> int | None:
    """How many rows the data set's card promises."""
    splits = getattr(rows.info, "splits", None) or {}
    return splits[split].num_examples or None if split in splits else None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
