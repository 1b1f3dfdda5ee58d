"""Compressed files give back their bytes, and say when they were cut short."""

import gzip
import io
import zlib
from pathlib import Path

import pytest
import zstandard

from mor.data.compression import open_decompressed

DATA = b"".join(b"line %d of the file\n" % (i * i) for i in range(30_000))


def write(folder: Path, suffix: str, data: bytes = DATA) -> Path:
    path = folder / f"data{suffix}"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(compress(data))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bytes_come_back(suffix: str, tmp_path: Path):
    with open_decompressed(write(tmp_path, suffix)) as stream:
        assert stream.read() == DATA
    with open_decompressed(write(tmp_path, suffix)) as stream:
        assert list(stream) == io.BytesIO(DATA).readlines()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_empty_file_has_no_bytes(suffix: str, tmp_path: Path):
    with open_decompressed(write(tmp_path, suffix, b"")) as stream:
        assert stream.read() == b""


def test_frames_follow_each_other_and_may_lack_their_size(tmp_path: Path):
    stream = zstandard.ZstdCompressor().compressobj()
    streamed = stream.compress(DATA) + stream.flush()
    (tmp_path / "two.zst").write_bytes(streamed + zstandard.compress(b"") + zstandard.compress(b"more"))
    with open_decompressed(tmp_path / "two.zst") as file:
        assert file.read() == DATA + b"more"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_cut_short_is_an_error(suffix: str, share: float, tmp_path: Path):
    path = write(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with open_decompressed(path) as stream, pytest.raises(EOFError):
        stream.read()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_another_kind_is_an_error(suffix: str, tmp_path: Path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"this is not compressed at all, only named so")
    with open_decompressed(path) as stream, pytest.raises((EOFError, zlib.error, gzip.BadGzipFile)):
        stream.read()
