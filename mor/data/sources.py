"""Sources of documents: text, Markdown, JSON lines and parquet files, plain or compressed, and folders of them."""

import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mor.data.compression import COMPRESSIONS, open_decompressed
from mor.data.standard_library import StandardLibrary

STANDARD_LIBRARY = "standard-library"
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl",)
PARQUET_SUFFIX = ".parquet"

_READ_CHARACTERS = 2**16
_PARQUET_ROWS = 256
_BLANK_LINE = re.compile(r"\n\r?\n")


class Source(Protocol):
    """Documents in a fixed order, and a description by which to tell whether two sources give the same ones."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts that change when the documents do."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, one at a time."""
        ...


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
        listing = hashlib.sha256()
        num_bytes = 0
        for file in self.files:
            status = file.stat()
            num_bytes += status.st_size
            name = file.relative_to(self.root).as_posix() if file != self.root else file.name
            listing.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return {
            "kind": "files",
            "name": self.root.name,
            "files": len(self.files),
            "bytes": num_bytes,
            "listing": listing.hexdigest(),
            "text_field": self.text_field,
            "document_characters": self.document_characters,
        }

    def documents(self) -> Iterator[str]:
        """The documents, read as they are asked for. Raises ValueError naming the file and line that cannot be read."""
        for file in self.files:
            kind = _kind(file)
            if kind in TEXT_SUFFIXES:
                yield from _read_text(file, self.document_characters)
            elif kind in LINE_SUFFIXES:
                yield from _read_lines(file, self.text_field)
            else:
                yield from _read_parquet(file, self.text_field)


def open_source(path: str | Path, *, text_field: str = "text", max_bytes: int | None = None) -> Source:
    """The source at `path`, or the embedded corpus for the name "standard-library", of which `max_bytes` are taken."""
    if str(path) == STANDARD_LIBRARY:
        return StandardLibrary() if max_bytes is None else StandardLibrary(max_bytes=max_bytes)
    if max_bytes is not None:
        raise ValueError(f"max_bytes={max_bytes} is only for {STANDARD_LIBRARY!r}, not for {path}")
    return FileSource(path, text_field=text_field)


def read_documents(path: str | Path, *, text_field: str = "text") -> Iterator[str]:
    """The documents at `path`, as `FileSource` reads them."""
    return FileSource(path, text_field=text_field).documents()


def standard_library_documents(max_bytes: int | None = None) -> Iterator[str]:
    """The documents of the embedded corpus, as `StandardLibrary` gives them."""
    return open_source(STANDARD_LIBRARY, max_bytes=max_bytes).documents()


def _kind(file: Path) -> str | None:
    """The suffix that says how to read `file`, without that of its compression; None when unsupported."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS and suffixes[-2:-1] != [PARQUET_SUFFIX]:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else None
    return kind if kind in (*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX) else None


def _find_files(root: Path) -> list[Path]:
    supported = ", ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX))
    hint = f"supported are {supported}, all but parquet also with {' or '.join(COMPRESSIONS)}"
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if root.is_file():
        if _kind(root) is None:
            raise ValueError(f"{root} has an unsupported suffix; {hint}")
        return [root]
    inside = (path for path in root.rglob("*") if path.is_file())
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    files = sorted(path for path in visible if _kind(path) is not None)
    if not files:
        raise ValueError(f"folder {root} holds no file to read among its {len(visible)}; {hint}")
    return files


def _read_text(file: Path, document_characters: int) -> Iterator[str]:
    """`file` as documents of `document_characters` up to the next blank line, or of twice that where there is none."""
    waiting = ""
    with _clear_errors(file), open_decompressed(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        while piece := text.read(_READ_CHARACTERS):
            waiting += piece
            while (end := _cut(waiting, document_characters)) is not None:
                yield waiting[:end]
                waiting = waiting[end:]
    if waiting:
        yield waiting


def _cut(text: str, document_characters: int) -> int | None:
    """Where the first document of `text` ends; None while that cannot be told."""
    limit = 2 * document_characters
    if blank := _BLANK_LINE.search(text, document_characters - 1, limit):
        return blank.end()
    if len(text) < limit:
        return None
    line = text.rfind("\n", document_characters - 1, limit)
    return line + 1 if line >= 0 else limit


def _read_lines(file: Path, text_field: str) -> Iterator[str]:
    with _clear_errors(file), open_decompressed(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _text_of_line(line, text_field, f"{file}:{number}")


def _text_of_line(line: bytes, text_field: str, place: str) -> str:
    try:
        record = json.loads(line.strip().decode("utf-8-sig"))
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place}: not a line of JSON ({reason}): {line.strip()[:60]!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: the line holds a {type(record).__name__}; expected an object with {text_field!r}")
    if text_field not in record:
        raise ValueError(f"{place}: no field {text_field!r}; the line has {', '.join(map(repr, record)) or 'none'}")
    text = _checked_text(record[text_field], text_field, place)
    if b"\\u" in line:  # JSON can spell half a surrogate pair, which no encoding can hold
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: field {text_field!r} is not valid Unicode: {error}") from error
    return text


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file} needs pyarrow: pip install 'mor[parquet]'") from error
    try:
        with _clear_errors(file), pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise ValueError(f"{file}: no column {text_field!r}; the file has {', '.join(map(repr, names))}")
            batches = table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for row, value in enumerate(values):
                yield _checked_text(value, text_field, f"{file} row {row}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _checked_text(value: object, text_field: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {text_field!r} holds {value!r:.60} ({type(value).__name__}); expected text")
    return value


@contextlib.contextmanager
def _clear_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
