"""Documents to a folder of token shards: read, split, tokenised on all cores, written in order; it can be continued.

The shards depend on the documents, the tokenizer and the options alone, not on the number of workers nor on how often
the building was interrupted. Memory does not grow with the corpus.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mor.config import to_dict
from mor.data.build_folder import BuildFolder, build_folder
from mor.data.encoder import Encoder, Ids, make_encoder, one_thread_each
from mor.data.manifest import FILE_NAME, TOKENIZER_FOLDER, Manifest, SplitEntry, check_files, read_manifest
from mor.data.shard_writer import SplitWriter
from mor.data.split import Document, HashSplit, Split, make_document
from mor.data.stream import DocumentStream, GivenDocuments, Source
from mor.data.tokenizer import fingerprint, vocabulary_size, write_tokenizer

DEFAULT_SHARD_TOKENS = 2**26
_LARGEST_SHARD_TOKENS = 2**31
_BATCH_BYTES = 2**18
_WAITING_BATCHES = 2  # per worker: one being tokenised, one ready for when it is done


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """How much has been written so far, and which `share` of the source that is (None: its size is not known).

    An interrupted build that goes on counts what was written before.
    """

    documents: int
    tokens: int
    utf8_bytes: int
    share: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents to tokenise together, and where source and split stand after them."""

    documents: list[tuple[Split, Document]]
    place: dict[str, Any] | None
    share: float | None


def write_shards(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> Manifest:
    """As `build_shards`, for documents that can be read once only: an interrupted build starts anew.

    `source` is what the source of the documents says of itself. Without it an existing folder is never used again.
    """
    return build_shards(
        GivenDocuments(documents, None if source is None else dict(source)), tokenizer, folder, **options
    )


def build_shards(
    source: Source | GivenDocuments,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    validation_fraction: float = 0.01,
    workers: int | None = None,
    progress: Callable[[ShardProgress], None] | None = None,
) -> Manifest:
    """Tokenise the documents of `source` into `folder`, which appears whole or not at all.

    A folder that was made from the same source (by what it says of itself), by the same tokenizer and with the same
    options is left as it is, and no document is read. A build of it that was interrupted goes on from the last shard
    that became complete. While another process builds the same folder, this one waits. Memory holds a few batches of
    documents of about 256 KiB per worker, or one document where that is longer. Documents of white space alone are
    left out.

    Args:
        shard_tokens: a shard is closed by the document that reaches this many tokens.
        validation_fraction: share of the documents that is kept for validation, chosen by hash of the text.
        workers: threads that tokenise; None: one per core that this process may use.
        progress: called after each batch.

    Raises:
        ValueError: no documents, too few to split, text that cannot be tokenised, or an option out of range.
        FileExistsError: `folder` holds something else.
        OSError: the disk is full.
    """
    if not 1 <= shard_tokens <= _LARGEST_SHARD_TOKENS:
        raise ValueError(f"shard_tokens={shard_tokens} must lie between 1 and {_LARGEST_SHARD_TOKENS}")
    num_workers = num_cores() if workers is None else workers
    if num_workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    split = HashSplit(validation_fraction)
    wanted = _plan(source, tokenizer, shard_tokens, validation_fraction)
    plan = None if wanted.source is None else to_dict(wanted)
    with build_folder(Path(folder), plan, _tell_waiting) as build:
        if build is None:
            return _reuse(Path(folder), wanted)
        with one_thread_each():
            encode = functools.partial(_encode, encoder=make_encoder(tokenizer), workers=num_workers)
            entries = _build_splits(source, split, encode, build, wanted, progress)
        manifest = dataclasses.replace(wanted, splits=entries)
        write_tokenizer(tokenizer, _empty_folder(build.path / TOKENIZER_FOLDER))
        (build.path / FILE_NAME).write_text(json.dumps(to_dict(manifest), indent=2) + "\n", encoding="utf-8")
        build.finish()
    return manifest


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(
    source: Source | GivenDocuments, tokenizer: PreTrainedTokenizerFast, shard_tokens: int, validation_fraction: float
) -> Manifest:
    """The manifest as it will be, but for what is counted."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no eos_token, which must stand between documents")
    size = vocabulary_size(tokenizer)
    return Manifest(
        dtype="uint16" if size <= 2**16 else "uint32",
        vocabulary_size=size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_fingerprint=fingerprint(tokenizer),
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        source=json.loads(json.dumps(source.describe())),  # as it will be read back
        splits={},
    )


def _tell_waiting(folder: Path) -> None:
    warnings.warn(f"another process is at work in {folder}; waiting for it", stacklevel=2)


def _empty_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


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


def _build_splits(
    source: Source | GivenDocuments,
    split: HashSplit,
    encode: Callable[[Iterator[Batch]], Generator[tuple[Batch, list[Ids]], None, None]],
    build: BuildFolder,
    manifest: Manifest,
    progress: Callable[[ShardProgress], None] | None,
) -> dict[Split, SplitEntry]:
    with contextlib.ExitStack() as stack:
        writers, place = _open_writers(build, manifest, stack)
        if place is not None:
            split.load_state_dict(place["split"])
        batches = _batches(source.documents(place["source"] if place is not None else None), split)
        encoded = stack.enter_context(contextlib.closing(encode(batches)))
        for batch, ids_of_documents in encoded:
            complete = _num_shards(writers)
            for (name, document), ids in zip(batch.documents, ids_of_documents, strict=True):
                writers[name].add(ids, document.utf8_bytes)
            if batch.place is not None and _num_shards(writers) > complete:
                build.keep({"place": batch.place, "splits": {name: w.checkpoint() for name, w in writers.items()}})
            if progress is not None:
                progress(_sum(writers.values(), batch.share))
        if not sum(writer.documents for writer in writers.values()):
            raise ValueError("the corpus is empty: it has no document with text in it")
        return {name: writer.finish() for name, writer in writers.items()}


def _open_writers(
    build: BuildFolder, manifest: Manifest, stack: contextlib.ExitStack
) -> tuple[dict[Split, SplitWriter], dict[str, Any] | None]:
    """(a writer for each split, where to go on or None for the beginning)."""
    splits: tuple[Split, ...] = ("train", "validation") if manifest.validation_fraction else ("train",)
    if (found := build.checkpoint) is not None:
        try:
            with contextlib.ExitStack() as opened:
                writers: dict[Split, SplitWriter] = {
                    split: opened.enter_context(SplitWriter(build.path, split, manifest, found["splits"][split]))
                    for split in splits
                }
                stack.push(opened.pop_all())
            return writers, found["place"]
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{build.path} cannot be continued, starting anew: {error}", stacklevel=2)
    build.clear()
    return {split: stack.enter_context(SplitWriter(build.path, split, manifest)) for split in splits}, None


def _batches(stream: DocumentStream, split: HashSplit) -> Iterator[Batch]:
    dealt: list[tuple[Split, Document]] = []
    num_bytes = 0
    for text in stream:
        if not text or text.isspace():
            continue
        document = make_document(text)
        dealt += split.add(document)
        num_bytes += document.utf8_bytes
        if num_bytes >= _BATCH_BYTES:
            source = stream.position()
            place = None if source is None else {"source": source, "split": split.state_dict()}
            yield Batch(documents=dealt, place=place, share=stream.share())
            dealt, num_bytes = [], 0
    dealt += split.finish()
    if dealt:
        yield Batch(documents=dealt, place=None, share=stream.share())


def _encode(batches: Iterable[Batch], encoder: Encoder, workers: int) -> Generator[tuple[Batch, list[Ids]], None, None]:
    """Each batch with the ids of its documents, in order; as many are in work as keep `workers` threads busy."""
    waiting: collections.deque[tuple[Batch, Any]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encoder.encode, [document.text for _, document in batch.documents])))
            if len(waiting) >= _WAITING_BATCHES * workers:
                first, ids = waiting.popleft()
                yield first, ids.result()
        while waiting:
            first, ids = waiting.popleft()
            yield first, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_shards(writers: Mapping[Split, SplitWriter]) -> int:
    return sum(writer.num_shards for writer in writers.values())


def _sum(writers: Iterable[SplitWriter], share: float | None) -> ShardProgress:
    counts = [(writer.documents, writer.tokens, writer.utf8_bytes) for writer in writers]
    documents, tokens, utf8_bytes = map(sum, zip(*counts))
    return ShardProgress(documents=documents, tokens=tokens, utf8_bytes=utf8_bytes, share=share)
