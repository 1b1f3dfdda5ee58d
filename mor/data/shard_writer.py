"""Writing the shards of a split, one after the other, so that writing can go on where an earlier process left off."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mor.config import from_dict, to_dict
from mor.data.encoder import Ids
from mor.data.manifest import END_BYTES, Manifest, ShardEntry, SplitEntry
from mor.data.split import Split

_HASHED_BYTES = 2**20


class SplitWriter:
    """The shards of one split. `state` is what `checkpoint` gave to an earlier writer of the same folder.

    Raises ValueError when the folder does not hold what the state says.
    """

    def __init__(self, folder: Path, split: Split, manifest: Manifest, state: dict[str, Any] | None = None) -> None:
        self.documents = self.tokens = self.utf8_bytes = 0
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._shard: ShardWriter | None = None
        self._entries: list[ShardEntry] = []
        if state is not None:
            self._restore(state)

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    @property
    def num_shards(self) -> int:
        """Shards that are complete."""
        return len(self._entries)

    def add(self, ids: Ids, utf8_bytes: int) -> None:
        """Append one document of `utf8_bytes` bytes of text, and the token that ends it."""
        if self._shard is None:
            self._shard = ShardWriter(self._folder, self._name(), self._manifest)
        self._shard.add(ids)
        self.documents += 1
        self.tokens += len(ids) + 1
        self.utf8_bytes += utf8_bytes
        if self._shard.tokens >= self._manifest.shard_tokens:
            self._close_shard()

    def finish(self) -> SplitEntry:
        """Close the last shard and sum up."""
        self._close_shard()
        return self._sum()

    def checkpoint(self) -> dict[str, Any]:
        """All that was added so far, which is on the disk when this returns."""
        unfinished = None
        if self._shard is not None:
            self._shard.sync()
            unfinished = {"documents": self._shard.documents, "tokens": self._shard.tokens}
        return {"complete": to_dict(self._sum()), "unfinished": unfinished}

    def _restore(self, state: dict[str, Any]) -> None:
        complete = from_dict(SplitEntry, state["complete"])
        self.documents, self.tokens, self.utf8_bytes = complete.documents, complete.tokens, complete.utf8_bytes
        self._entries = list(complete.shards)
        for entry in self._entries:
            _check_size(entry.tokens_file(self._folder), entry.tokens * self._manifest.token_bytes)
            _check_size(entry.ends_file(self._folder), entry.documents * END_BYTES)
        if state["unfinished"] is not None:
            self._shard = ShardWriter(self._folder, self._name(), self._manifest, **state["unfinished"])

    def _name(self) -> str:
        return f"{self._split}-{len(self._entries):05d}"

    def _sum(self) -> SplitEntry:
        return SplitEntry(
            documents=self.documents, tokens=self.tokens, utf8_bytes=self.utf8_bytes, shards=tuple(self._entries)
        )

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None


class ShardWriter:
    """The two files of one shard: new ones, or those that hold `documents` and `tokens` already, and maybe more."""

    def __init__(self, folder: Path, name: str, manifest: Manifest, documents: int = 0, tokens: int = 0) -> None:
        self.documents = documents
        self.tokens = tokens
        self._name = name
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._end = manifest.eos_token_id
        self._hashes = (hashlib.sha256(), hashlib.sha256())
        sizes = (tokens * manifest.token_bytes, documents * END_BYTES)
        names = (folder / f"{name}.bin", folder / f"{name}.ends.bin")
        self._files = tuple(_open(path, size, total) for path, size, total in zip(names, sizes, self._hashes))

    def add(self, ids: Ids) -> None:
        """Append the ids of one document and the token that ends it."""
        closed = np.empty(len(ids) + 1, dtype=self._dtype)
        closed[:-1], closed[-1] = ids, self._end
        self.tokens += len(closed)
        self.documents += 1
        for values, file, total in zip((closed, np.array(self.tokens, dtype="<u4")), self._files, self._hashes):
            data = values.tobytes()
            file.write(data)
            total.update(data)

    def sync(self) -> None:
        """Wait until all that was added is on the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close the files of a shard that did not become complete."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> ShardEntry:
        """Close the files; they are complete, and on the disk, when this returns."""
        self.sync()
        for file in self._files:
            file.close()
        tokens_sha256, ends_sha256 = (total.hexdigest() for total in self._hashes)
        return ShardEntry(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            tokens_sha256=tokens_sha256,
            ends_sha256=ends_sha256,
        )


def _open(path: Path, num_bytes: int, total: Any) -> BinaryIO:
    """`path` cut to its first `num_bytes`, which are hashed into `total`, to be written on."""
    if not num_bytes:
        return path.open("wb")
    _check_size(path, num_bytes, longer=True)
    file = path.open("r+b")
    file.truncate(num_bytes)
    while data := file.read(_HASHED_BYTES):
        total.update(data)
    return file


def _check_size(path: Path, num_bytes: int, *, longer: bool = False) -> None:
    found = path.stat().st_size if path.is_file() else -1
    if found < num_bytes or (found > num_bytes and not longer):
        raise ValueError(f"{path} has {max(found, 0)} bytes instead of {num_bytes}")
