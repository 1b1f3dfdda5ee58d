"""Token shards for reading: the documents of one split as slices of memory-mapped files."""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from mor.data.build import ShardProgress, build_shards, write_shards
from mor.data.encoder import Ids
from mor.data.manifest import TOKENIZER_FOLDER, check_files, read_manifest
from mor.data.split import Split
from mor.data.tokenizer import fingerprint, load_tokenizer

__all__ = ["ShardProgress", "TokenShards", "build_shards", "write_shards"]

_HASHED_BYTES = 2**20


class TokenShards:
    """The documents of one split, in the order in which they were written; each ends with `eos_token_id`.

    Opening checks that the files are there, whole and of this version; `verify` reads them through. Raises
    FileNotFoundError for a missing folder or shard, ValueError for a damaged one or a split that was not made.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder = Path(folder)
        self.split: Split = split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest.splits:
            made = ", ".join(map(repr, self.manifest.splits))
            raise ValueError(f"{folder} has no split {split!r}; it was made with {made}")
        check_files(self.folder, self.manifest, split)
        self._entry = self.manifest.splits[split]
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        shards = self._entry.shards
        self._tokens = [np.memmap(shard.tokens_file(self.folder), dtype=dtype, mode="r") for shard in shards]
        self._ends = [np.memmap(shard.ends_file(self.folder), dtype="<u4", mode="r") for shard in shards]
        self._first_document = _starts(shard.documents for shard in shards)
        self._first_token = _starts(shard.tokens for shard in shards)

    def __len__(self) -> int:
        return self._entry.documents

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return self._entry.documents

    @property
    def num_tokens(self) -> int:
        """Tokens in the split, the ends of documents among them."""
        return self._entry.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, with the ends of documents counted as tokens: what bits per byte divide by."""
        return self._entry.utf8_bytes / self._entry.tokens

    @property
    def vocabulary_size(self) -> int:
        """Every token id is below this."""
        return self.manifest.vocabulary_size

    @property
    def eos_token_id(self) -> int:
        """The token that ends each document."""
        return self.manifest.eos_token_id

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) by which to recognise the same tokens in the same order."""
        hashes = (shard.tokens_sha256 + shard.ends_sha256 for shard in self._entry.shards)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def document(self, index: int, start: int = 0, stop: int | None = None) -> Ids:
        """The ids of document `index`, or of its part from `start` to `stop`, as a view of the file.

        Raises ValueError for an id outside the vocabulary, which only a damaged file can hold.
        """
        shard, first, last = self._locate(index)
        end = last if stop is None else min(first + stop, last)
        return self._checked(self._tokens[shard][first + start : end], shard)

    def read(self, start: int, stop: int) -> Ids:
        """The ids from `start` to `stop` of the whole split, documents one after the other. Raises as `document`."""
        pieces = [self._checked(self._tokens[shard][a:b], shard) for shard, a, b in self._parts(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where documents begin among the tokens from `start` to `stop`, ascending."""
        found: list[npt.NDArray[np.int64]] = []
        for shard, a, b in self._parts(start, stop):
            ends = self._ends[shard]
            first, last = np.searchsorted(ends, a), np.searchsorted(ends, b)
            starts = ends[first:last].astype(np.int64)
            found.append(self._first_token[shard] + (starts if a else np.concatenate(([0], starts))))
        return np.concatenate(found)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards in which the tokens from `start` to `stop` lie, and from where to where in each."""
        shard = bisect.bisect_right(self._first_token, start) - 1
        while start < stop and shard < len(self._tokens):
            offset = start - self._first_token[shard]
            length = min(len(self._tokens[shard]) - offset, stop - start)
            yield shard, offset, offset + length
            start += length
            shard += 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when a model of `vocab_size` has no embedding for some of the token ids."""
        if vocab_size < self.vocabulary_size:
            raise ValueError(
                f"vocab_size={vocab_size} is too small for {self.folder}, "
                f"whose tokenizer has {self.vocabulary_size} tokens"
            )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the shards. Raises ValueError when the one in the folder is another."""
        path = self.folder / TOKENIZER_FOLDER
        tokenizer = load_tokenizer(path)
        if fingerprint(tokenizer) != self.manifest.tokenizer_fingerprint:
            raise ValueError(f"{path} is not the tokenizer that made these shards: its fingerprint differs")
        return tokenizer

    def stamps(self) -> tuple[tuple[int, int], ...]:
        """Size and time of the last change, in nanoseconds, of every file of the split."""
        files = (file for shard in self._entry.shards for file in (shard.tokens_file, shard.ends_file))
        found = [file(self.folder).stat() for file in files]
        return tuple((each.st_size, each.st_mtime_ns) for each in found)

    def verify(self) -> None:
        """Read every file of the split. Raises ValueError when one is not what was written."""
        for index, shard in enumerate(self._entry.shards):
            for file, expected in (
                (shard.tokens_file(self.folder), shard.tokens_sha256),
                (shard.ends_file(self.folder), shard.ends_sha256),
            ):
                found = _hash_file(file)
                if found != expected:
                    raise ValueError(f"shard {file} is damaged: sha256 {found}, but the manifest says {expected}")
            self._checked(self._tokens[index], index)

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(shard, start, stop) of document `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = bisect.bisect_right(self._first_document, index) - 1
        local = index - self._first_document[shard]
        ends = self._ends[shard]
        return shard, int(ends[local - 1]) if local else 0, int(ends[local])

    def _checked(self, ids: Ids, shard: int) -> Ids:
        if ids.size and int(ids.max()) >= self.vocabulary_size:
            file = self._entry.shards[shard].tokens_file(self.folder)
            found = f"token id {int(ids.max())} is outside the vocabulary of {self.vocabulary_size}"
            raise ValueError(f"shard {file} is damaged: {found}")
        return ids


def _starts(lengths: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)][:-1]


def _hash_file(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_HASHED_BYTES):
            total.update(data)
    return total.hexdigest()
