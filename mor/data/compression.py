"""Compressed files as streams of bytes, in which a file that was cut short is an error."""

import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".zst")

# Published corpora are compressed with windows of up to this size; the library's own limit is lower.
_LARGEST_WINDOW = 2**31
_CHUNK_BYTES = 2**17


def open_decompressed(file: Path, raw: BinaryIO | None = None) -> BinaryIO:
    """The bytes of `file`, decompressed as its suffix says; read through `raw`, an open file, where one is given.

    Reading raises EOFError when the file was cut short; gzip.BadGzipFile, zlib.error or EOFError when it is damaged.
    """
    compression = file.suffix.lower()
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(raw or file, "rb"))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(ZstandardReader(raw or file.open("rb")), _CHUNK_BYTES))
    return raw or file.open("rb")


class ZstandardReader(io.RawIOBase):
    """The decompressed bytes of an open Zstandard file of one or more frames.

    The reader of the library itself ends quietly where a file was cut short; this one raises EOFError.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame = self._context.decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and (compressed := self._file.read(_CHUNK_BYTES)):
            self._ready = memoryview(self._decompress(compressed))
        if not self._ready and self._is_inside:
            raise EOFError("the last frame has no end")
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, compressed: bytes) -> bytes:
        pieces: list[bytes] = []
        while compressed:
            try:
                pieces.append(self._frame.decompress(compressed))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._is_inside = not self._frame.eof
            compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = self._context.decompressobj()
        return b"".join(pieces)
