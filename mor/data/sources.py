"""Sources of documents by name: files, folders, data sets of the Hugging Face hub or on disk, and mixtures of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mor.data.address import split_options, split_weight
from mor.data.compression import COMPRESSIONS
from mor.data.hub import HUB_PREFIX, HubSource
from mor.data.listing import summarise
from mor.data.mixture import Mixture
from mor.data.readers import LINE_SUFFIXES, PARQUET_SUFFIX, TEXT_SUFFIXES, FileReader, file_kind
from mor.data.saved_dataset import SavedDataset, is_saved_dataset
from mor.data.standard_library import StandardLibrary
from mor.data.stream import DocumentStream, Position, Source

STANDARD_LIBRARY = "standard-library"

__all__ = ["STANDARD_LIBRARY", "FileSource", "Source", "open_mixture", "open_source", "read_documents"]


class FileSource:
    """The documents of one file, or of all supported files in a folder and its sub-folders in order of their names.

    `text_field` is the field of JSON lines and parquet files that holds the text. A text file longer than
    `document_characters` is cut at blank lines into documents of about that length, so that a book can be shuffled and
    split; nothing is lost between them. Raises FileNotFoundError or ValueError as soon as it is built when `path` is
    missing, of an unsupported kind, or a folder without supported files.
    """

    def __init__(self, path: str | Path, *, text_field: str = "text", document_characters: int = 16384) -> None:
        if document_characters < 1:
            raise ValueError(f"document_characters={document_characters} must be at least 1")
        self.root = Path(path)
        self.text_field = text_field
        self.document_characters = document_characters
        self.files = _find_files(self.root)

    def describe(self) -> dict[str, Any]:
        """Names, sizes and times of change of the files, summed up, and how they are read."""
        return {
            "kind": "files",
            **summarise(self.root, self.files),
            "text_field": self.text_field,
            "document_characters": self.document_characters,
        }

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The documents, read as they are asked for. Raises ValueError naming the file and line that cannot be read."""
        return FileStream(self, position)

    def reader(self, index: int) -> FileReader:
        """What reads file `index`."""
        return FileReader(
            file=self.files[index], text_field=self.text_field, document_characters=self.document_characters
        )


class FileStream:
    """The documents of a `FileSource`; a position is a file and how many documents it has given."""

    def __init__(self, source: FileSource, position: Position | None) -> None:
        self._source = source
        self._file, self._given = (position["file"], position["documents"]) if position else (0, 0)
        self._sizes = [file.stat().st_size for file in source.files]
        self._reader: FileReader | None = None
        self._texts = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._texts)

    def position(self) -> Position | None:
        return {"file": self._file, "documents": self._given}

    def share(self) -> float | None:
        done: float = sum(self._sizes[: self._file])
        if self._reader is not None:
            done += self._reader.share() * self._sizes[self._file]
        return done / max(1, sum(self._sizes))

    def _read(self) -> Iterator[str]:
        while self._file < len(self._sizes):
            self._reader = self._source.reader(self._file)
            for text in self._reader.documents(self._given):
                self._given += 1
                yield text
            self._reader, self._given = None, 0
            self._file += 1


def open_source(address: str | Path, *, text_field: str = "text", max_bytes: int | None = None) -> Source:
    """The source that `address` names.

    "standard-library" is the embedded corpus, of which `max_bytes` are taken; `hf://...` a data set that the library
    `datasets` streams; all else a path: a folder written by its `save_to_disk`, a file, or a folder of files. After a
    path, `?column=...` and, for saved data sets, `&split=...` may follow. Raises FileNotFoundError or ValueError.
    """
    if str(address) == STANDARD_LIBRARY:
        return StandardLibrary() if max_bytes is None else StandardLibrary(max_bytes=max_bytes)
    if max_bytes is not None:
        raise ValueError(f"max_bytes={max_bytes} is only for {STANDARD_LIBRARY!r}, not for {address}")
    if str(address).startswith(HUB_PREFIX):
        return HubSource(str(address), column=text_field)
    place, options = (address, {}) if Path(address).exists() else split_options(str(address), ("column", "split"))
    column = options.get("column", text_field)
    if is_saved_dataset(Path(place)):
        return SavedDataset(place, column=column, split=options.get("split"))
    if "split" in options:
        raise ValueError(f"{address}: only data sets of the library datasets have splits, not {place}")
    return FileSource(place, text_field=column)


def open_mixture(addresses: Sequence[str], *, text_field: str = "text") -> Source:
    """The one source given, or several mixed by their weights, as in `["a=0.7", "b=0.3"]`.

    Raises ValueError where one of several has no weight.
    """
    parts = [split_weight(address) for address in addresses]
    if len(parts) == 1:
        return open_source(parts[0][0], text_field=text_field)
    weights: list[float] = []
    for address, weight in parts:
        if weight is None:
            raise ValueError(f"{address} has no weight; to mix sources give each one, such as {address}=0.5")
        weights.append(weight)
    return Mixture([open_source(address, text_field=text_field) for address, _ in parts], weights)


def read_documents(path: str | Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents at `path`, as `FileSource` reads them."""
    return iter(FileSource(path, text_field=text_field).documents())


def standard_library_documents(max_bytes: int | None = None) -> Iterator[str]:
    """The documents of the embedded corpus, as `StandardLibrary` gives them."""
    return iter(open_source(STANDARD_LIBRARY, max_bytes=max_bytes).documents())


def _find_files(root: Path) -> list[Path]:
    supported = ", ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX))
    hint = f"supported are {supported}, all but parquet also with {' or '.join(COMPRESSIONS)}"
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if root.is_file():
        if file_kind(root) is None:
            raise ValueError(f"{root} has an unsupported suffix; {hint}")
        return [root]
    inside = (path for path in root.rglob("*") if path.is_file())
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    files = sorted(path for path in visible if file_kind(path) is not None)
    if not files:
        raise ValueError(f"folder {root} holds no file to read among its {len(visible)}; {hint}")
    return files
