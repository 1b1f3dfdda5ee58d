"""Held-out text as rows of tokens: from token shards, or from text, JSON lines or parquet as they are.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.data.encoder import make_encoder
from mor.data.loader import evaluation_batches
from mor.data.manifest import FILE_NAME, read_manifest
from mor.data.shards import TokenShards
from mor.data.sources import open_source
from mor.data.tokenizer import fingerprint


def open_rows(
    path: str | Path, tokenizer: Any, *, batch_size: int, sequence_length: int, max_tokens: int
) -> Iterator[Tensor]:
    """Batches (B, T) of token ids, at most `max_tokens` in all, in a fixed order.

    A folder of token shards gives its validation split (or the only one it has), which must have been made with
    `tokenizer`; any other path is read as `mor.data.sources.open_source` does, with the end-of-text token between
    documents.

    Raises:
        ValueError: shards of another tokenizer, or too little text for one row.
        FileNotFoundError: nothing is there.
    """
    if (Path(path) / FILE_NAME).is_file():
        shards = _held_out(Path(path), tokenizer)
        return evaluation_batches(shards, batch_size=batch_size, sequence_length=sequence_length, max_tokens=max_tokens)
    rows = list(_packed_rows(path, tokenizer, sequence_length, max_tokens // sequence_length))
    if not rows:
        raise ValueError(f"{path} has too little text for one row of sequence_length={sequence_length} tokens")
    return iter(torch.stack(rows).split(batch_size))


def _held_out(folder: Path, tokenizer: Any) -> TokenShards:
    manifest = read_manifest(folder)
    if fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise ValueError(f"{folder} was made with another tokenizer than the model's; give the text itself instead")
    return TokenShards(folder, "validation" if "validation" in manifest.splits else "train")


def _packed_rows(path: str | Path, tokenizer: Any, length: int, num_rows: int) -> Iterator[Tensor]:
    encoder, waiting = make_encoder(tokenizer), []
    for document in open_source(path).documents():
        if num_rows <= 0:
            return
        waiting += [*encoder.encode([document])[0].tolist(), tokenizer.eos_token_id]
        while len(waiting) >= length and num_rows > 0:
            yield torch.tensor(waiting[:length])
            waiting, num_rows = waiting[length:], num_rows - 1
