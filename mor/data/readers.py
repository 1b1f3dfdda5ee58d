"""The documents of one file: text cut at blank lines, lines of JSON, or a column of a parquet file."""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mor.data.compression import COMPRESSIONS, open_decompressed

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl",)
PARQUET_SUFFIX = ".parquet"

_READ_CHARACTERS = 2**16
_PARQUET_ROWS = 256
_BLANK_LINE = re.compile(r"\n\r?\n")


@dataclass(kw_only=True)
class FileReader:
    """One file and how to read it; `share` tells which part of it has been read, while it is being read."""

    file: Path
    text_field: str
    document_characters: int
    share: Callable[[], float] = field(default=lambda: 0.0)

    def documents(self, skip: int = 0) -> Iterator[str]:
        """The documents after the first `skip`. ValueError naming the file and the line or row that cannot be read."""
        kind = file_kind(self.file)
        if kind in TEXT_SUFFIXES:
            return itertools.islice(_read_text(self), skip, None)
        return _read_lines(self, skip) if kind in LINE_SUFFIXES else _read_parquet(self, skip)


def file_kind(file: Path) -> str | None:
    """The suffix that says how to read `file`, without that of its compression; None when unsupported."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS and suffixes[-2:-1] != [PARQUET_SUFFIX]:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else None
    return kind if kind in (*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX) else None


def checked_text(value: object, text_field: str, place: str) -> str:
    """`value`, if it is text. ValueError naming the place otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {text_field!r} holds {value!r:.60} ({type(value).__name__}); expected text")
    return value


def _read_text(reader: FileReader) -> Iterator[str]:
    """The file as documents of `document_characters` up to the next blank line, or twice that where there is none."""
    waiting = ""
    with _clear_errors(reader.file), _open(reader) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        while piece := text.read(_READ_CHARACTERS):
            waiting += piece
            while (end := _cut(waiting, reader.document_characters)) is not None:
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


def _read_lines(reader: FileReader, skip: int) -> Iterator[str]:
    number = 0
    with _clear_errors(reader.file, lambda: f" after line {number}"), _open(reader) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            yield _text_of_line(line, reader.text_field, f"{reader.file}:{number}")


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
    text = checked_text(record[text_field], text_field, place)
    if b"\\u" in line:  # JSON can spell half a surrogate pair, which no encoding can hold
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: field {text_field!r} is not valid Unicode: {error}") from error
    return text


def _read_parquet(reader: FileReader, skip: int) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {reader.file} needs pyarrow: pip install 'mor[parquet]'") from error
    file, column, row = reader.file, reader.text_field, 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise ValueError(f"{file}: no column {column!r}; the file has {', '.join(map(repr, names))}")
            group, row = _find_row_group(table.metadata, skip)
            num_rows = max(1, table.metadata.num_rows)
            reader.share = lambda: row / num_rows
            for value in _column(table, column, range(group, table.metadata.num_row_groups)):
                if row >= skip:
                    yield checked_text(value, column, f"{file} row {row}")
                row += 1
    except pyarrow.ArrowException as error:
        raise _unreadable(file, row, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(file, row, error) from error


def _column(table: Any, column: str, groups: range) -> Iterator[object]:
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[column], row_groups=list(groups)):
        yield from batch.column(0).to_pylist()


def _find_row_group(metadata: Any, row: int) -> tuple[int, int]:
    """(row group that holds `row`, the first row of that group)."""
    first = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if row < first + num_rows:
            return group, first
        first += num_rows
    return metadata.num_row_groups, first


def _unreadable(file: Path, row: int, error: Exception) -> ValueError:
    place = f", damaged after row {row}" if row else ""
    return ValueError(f"{file} is not a readable parquet file{place}: {error}")


@contextlib.contextmanager
def _open(reader: FileReader) -> Iterator[Any]:
    """The decompressed bytes of the file; its share is that of the bytes on the disk."""
    with reader.file.open("rb") as raw, open_decompressed(reader.file, raw) as stream:
        num_bytes = max(1, os.fstat(raw.fileno()).st_size)
        reader.share = lambda: raw.tell() / num_bytes
        yield stream


@contextlib.contextmanager
def _clear_errors(file: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged or cut short{place()}: {error}") from error
