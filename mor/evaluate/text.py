"""Held-out text as rows of tokens: from token shards, or from text, JSON lines or parquet as they are.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.data.encoder import make_encoder
from mor.data.loader import evaluation_batches
from mor.data.manifest import FILE_NAME, read_manifest
from mor.data.readers import TEXT_SUFFIXES, file_kind
from mor.data.shards import TokenShards
from mor.data.sources import FileSource, open_source
from mor.data.tokenizer import fingerprint


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows of held-out tokens, and which document and domain each token is of.

    `rows_NT`: token ids. `document_NT`: documents numbered from 0 through all rows; a document ends with its
    end-of-text token. `domain_D`: each document's index in `domains`.
    """

    rows_NT: Tensor
    document_NT: Tensor
    domain_D: Tensor
    domains: tuple[str, ...]


def open_held_out(
    paths: Sequence[str], tokenizer: Any, *, sequence_length: int, max_tokens: int, domain_field: str | None = None
) -> HeldOut:
    """Held-out text of one or several places, each as `open_rows` reads it, with equal shares of `max_tokens`.

    Domains are the values of `domain_field` in JSON lines or parquet, otherwise the places themselves. Rows of token
    shards are taken at equal distances; what lies between two rows counts as inside the document that both are in.

    Raises:
        ValueError: as `open_rows`, or `domain_field` for a place whose documents have no fields.
        FileNotFoundError: nothing is there.
    """
    parts, documents, domains = list[Tensor](), list[Tensor](), list[str]()
    for path in paths:
        share, names = max_tokens // len(paths), list[str]()
        batches = open_rows(
            path, tokenizer, batch_size=64, sequence_length=sequence_length, max_tokens=share, names=names,
            domain_field=domain_field,
        )  # fmt: skip
        rows_NT = torch.cat(list(batches))
        number_NT = _count_documents(rows_NT, tokenizer.eos_token_id)
        documents.append(number_NT + len(domains))
        parts.append(rows_NT)
        num_documents = int(number_NT.max()) + 1
        domains += (names or [_place_name(path)] * num_documents)[:num_documents]
    found = sorted(set(domains))
    index = {name: number for number, name in enumerate(found)}
    return HeldOut(
        rows_NT=torch.cat(parts),
        document_NT=torch.cat(documents),
        domain_D=torch.tensor([index[name] for name in domains]),
        domains=tuple(found),
    )


def _count_documents(rows_NT: Tensor, end_of_text: int) -> Tensor:
    """(N, T) each token's document, counted through all rows."""
    ends = (rows_NT == end_of_text).flatten().long()
    return (ends.cumsum(0) - ends).view_as(rows_NT)


def _place_name(path: str) -> str:
    """A place as the name of a domain: without folders and suffixes."""
    return Path(path).name.partition(".")[0] or str(path)


def open_rows(
    path: str | Path,
    tokenizer: Any,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int,
    domain_field: str | None = None,
    names: list[str] | None = None,
) -> Iterator[Tensor]:
    """Batches (B, T) of token ids, at most `max_tokens` in all, in a fixed order.

    A folder of token shards gives its validation split (or the only one it has), which must have been made with
    `tokenizer`; any other path is read as `mor.data.sources.open_source` does, with the end-of-text token between
    documents. With `domain_field`, its value for each document that was read is added to `names`.

    Raises:
        ValueError: shards of another tokenizer, too little text for one row, or `domain_field` where there are no
        fields.
        FileNotFoundError: nothing is there.
    """
    if (Path(path) / FILE_NAME).is_file():
        if domain_field is not None:
            raise ValueError(f"{path}: token shards have no field {domain_field!r}; give the text itself instead")
        shards = _held_out(Path(path), tokenizer)
        return evaluation_batches(shards, batch_size=batch_size, sequence_length=sequence_length, max_tokens=max_tokens)
    if max_tokens < sequence_length:
        raise ValueError(f"max_tokens={max_tokens} is too small for one row of sequence_length={sequence_length}")
    named = _named_documents(path, domain_field)
    rows = list(_packed_rows(named, tokenizer, sequence_length, max_tokens // sequence_length, names))
    if not rows:
        raise ValueError(f"{path} has too little text for one row of sequence_length={sequence_length} tokens")
    return iter(torch.stack(rows).split(batch_size))


def _held_out(folder: Path, tokenizer: Any) -> TokenShards:
    manifest = read_manifest(folder)
    if fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise ValueError(f"{folder} was made with another tokenizer than the model's; give the text itself instead")
    return TokenShards(folder, "validation" if "validation" in manifest.splits else "train")


def _named_documents(path: str | Path, domain_field: str | None) -> Iterator[tuple[str, str | None]]:
    """Documents, each with its value of `domain_field`, which is read in a second pass beside the first."""
    source = open_source(path)
    if domain_field is None:
        return ((text, None) for text in source.documents())
    has_fields = isinstance(source, FileSource) and all(file_kind(f) not in TEXT_SUFFIXES for f in source.files)
    if not has_fields or "?" in str(path):
        raise ValueError(f"{path}: only files of JSON lines or parquet have a field {domain_field!r}")
    return zip(source.documents(), open_source(path, text_field=domain_field).documents(), strict=True)


def _packed_rows(
    documents: Iterator[tuple[str, str | None]],
    tokenizer: Any,
    length: int,
    num_rows: int,
    names: list[str] | None,
) -> Iterator[Tensor]:
    encoder, waiting = make_encoder(tokenizer), []
    for document, name in documents:
        if num_rows <= 0:
            return
        if names is not None and name is not None:
            names.append(name)
        waiting += [*encoder.encode([document])[0].tolist(), tokenizer.eos_token_id]
        while len(waiting) >= length and num_rows > 0:
            yield torch.tensor(waiting[:length])
            waiting, num_rows = waiting[length:], num_rows - 1
