"""Documents to a folder of token shards, with memory that does not grow with the corpus."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mor.config import to_dict
from mor.data.encoder import Ids, make_encoder
from mor.data.manifest import FILE_NAME, TOKENIZER_FOLDER, Manifest, ShardEntry, SplitEntry, check_files, read_manifest
from mor.data.split import Document, HashSplit, Split, make_document
from mor.data.tokenizer import fingerprint, vocabulary_size, write_tokenizer
from mor.files import new_folder

DEFAULT_SHARD_TOKENS = 2**26
_LARGEST_SHARD_TOKENS = 2**31
_BATCH_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """How much has been written so far."""

    documents: int
    tokens: int
    utf8_bytes: int


def write_shards(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    validation_fraction: float = 0.01,
    progress: Callable[[ShardProgress], None] | None = None,
) -> Manifest:
    """Tokenise `documents` into `folder`, which appears whole or not at all.

    A folder that was made from the same `source` (what `Source.describe` says), by the same tokenizer and with the same
    options is left as it is, and `documents` is not read. Memory holds a batch of documents of about 1 MiB, or one
    document where that is longer. Documents of white space alone are left out.

    Args:
        shard_tokens: a shard is closed by the document that reaches this many tokens.
        validation_fraction: share of the documents that is kept for validation, chosen by hash of the text.
        progress: called after each batch.

    Raises:
        ValueError: no documents, too few to split, text that cannot be tokenised, or an option out of range.
        FileExistsError: `folder` holds something else.
        OSError: the disk is full.
    """
    if not 1 <= shard_tokens <= _LARGEST_SHARD_TOKENS:
        raise ValueError(f"shard_tokens={shard_tokens} must lie between 1 and {_LARGEST_SHARD_TOKENS}")
    size = vocabulary_size(tokenizer)
    wanted = Manifest(
        dtype="uint16" if size <= 2**16 else "uint32",
        vocabulary_size=size,
        eos_token_id=_eos_token_id(tokenizer),
        tokenizer_fingerprint=fingerprint(tokenizer),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        source=None if source is None else json.loads(json.dumps(dict(source))),  # as it will be read back
        splits={},
    )
    split = HashSplit(validation_fraction)
    target = Path(folder)
    if (target / FILE_NAME).exists():
        return _reuse(target, wanted)
    with new_folder(target) as partial:
        dealt = split.deal(_documents(documents))
        manifest = dataclasses.replace(wanted, splits=_write_splits(dealt, tokenizer, partial, wanted, progress))
        write_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
        (partial / FILE_NAME).write_text(json.dumps(to_dict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def _eos_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no eos_token, which must stand between documents")
    return tokenizer.eos_token_id


def _reuse(folder: Path, wanted: Manifest) -> Manifest:
    found = read_manifest(folder)
    if wanted.source is None:
        raise FileExistsError(f"{folder} holds token shards already; choose another folder or remove it first")
    for key, value in to_dict(wanted).items():
        if key != "splits" and to_dict(found)[key] != value:
            raise FileExistsError(
                f"{folder} holds token shards of another {key}: {to_dict(found)[key]}, not {value}; "
                "choose another folder or remove it first"
            )
    for split in found.splits:
        check_files(folder, found, split)
    return found


def _documents(texts: Iterable[str]) -> Iterator[Document]:
    is_empty = True
    for text in texts:
        if text and not text.isspace():
            is_empty = False
            yield make_document(text)
    if is_empty:
        raise ValueError("the corpus is empty: it has no document with text in it")


def _write_splits(
    dealt: Iterable[tuple[Split, Document]],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    manifest: Manifest,
    progress: Callable[[ShardProgress], None] | None,
) -> dict[Split, SplitEntry]:
    encoder = make_encoder(tokenizer)
    splits: tuple[Split, ...] = ("train", "validation") if manifest.validation_fraction else ("train",)
    with contextlib.ExitStack() as stack:
        writers: dict[Split, SplitWriter] = {
            split: stack.enter_context(SplitWriter(folder, split, manifest)) for split in splits
        }
        for batch in _batches(dealt):
            encoded = encoder.encode([document.text for _, document in batch])
            for (split, document), ids in zip(batch, encoded, strict=True):
                writers[split].add(ids, document.utf8_bytes)
            if progress is not None:
                progress(_sum(writers.values()))
        return {split: writer.finish() for split, writer in writers.items()}


def _batches(dealt: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    num_bytes = 0
    for split, document in dealt:
        if batch and num_bytes + document.utf8_bytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append((split, document))
        num_bytes += document.utf8_bytes
    if batch:
        yield batch


def _sum(writers: Iterable["SplitWriter"]) -> ShardProgress:
    counts = [(writer.documents, writer.tokens, writer.utf8_bytes) for writer in writers]
    documents, tokens, utf8_bytes = map(sum, zip(*counts))
    return ShardProgress(documents=documents, tokens=tokens, utf8_bytes=utf8_bytes)


class SplitWriter:
    """The shards of one split, written one after the other."""

    def __init__(self, folder: Path, split: Split, manifest: Manifest) -> None:
        self.documents = 0
        self.tokens = 0
        self.utf8_bytes = 0
        self._folder = folder
        self._split = split
        self._manifest = manifest
        self._shard: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def add(self, ids: Ids, utf8_bytes: int) -> None:
        """Append one document of `utf8_bytes` bytes of text, and the token that ends it."""
        if self._shard is None:
            name = f"{self._split}-{len(self._entries):05d}"
            self._shard = ShardWriter(self._folder, name, self._manifest)
        self._shard.add(ids)
        self.documents += 1
        self.tokens += len(ids) + 1
        self.utf8_bytes += utf8_bytes
        if self._shard.tokens >= self._manifest.shard_tokens:
            self._close_shard()

    def finish(self) -> SplitEntry:
        """Close the last shard and sum up."""
        self._close_shard()
        return SplitEntry(
            documents=self.documents, tokens=self.tokens, utf8_bytes=self.utf8_bytes, shards=tuple(self._entries)
        )

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None


class ShardWriter:
    """The two files of one shard."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        self.tokens = 0
        self._name = name
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._end = manifest.eos_token_id
        self._documents = 0
        self._hashes = (hashlib.sha256(), hashlib.sha256())
        self._files = tuple((folder / f"{name}{suffix}").open("wb") for suffix in (".bin", ".ends.bin"))

    def add(self, ids: Ids) -> None:
        """Append the ids of one document and the token that ends it."""
        closed = np.empty(len(ids) + 1, dtype=self._dtype)
        closed[:-1], closed[-1] = ids, self._end
        self.tokens += len(closed)
        self._documents += 1
        for values, file, total in zip((closed, np.array(self.tokens, dtype="<u4")), self._files, self._hashes):
            data = values.tobytes()
            file.write(data)
            total.update(data)

    def abandon(self) -> None:
        """Close the files of a shard that will not be kept."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> ShardEntry:
        """Close the files; they are complete when this returns."""
        for file in self._files:
            file.close()
        tokens_sha256, ends_sha256 = (total.hexdigest() for total in self._hashes)
        return ShardEntry(
            name=self._name,
            documents=self._documents,
            tokens=self.tokens,
            tokens_sha256=tokens_sha256,
            ends_sha256=ends_sha256,
        )
