"""Rows of held-out text from shards and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.evaluate.text import open_rows

SHAPE = {"batch_size": 2, "sequence_length": 8}


def test_files_are_packed_with_ends_between_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abcde"}\n{"text": "fghijklmnopqrst"}\n')
    found = torch.cat(list(open_rows(path, byte_tokenizer(), max_tokens=1000, **SHAPE)))
    expected = [*b"abcde", 256, *b"fghijklmnopqrst", 256]
    assert found.tolist() == [expected[:8], expected[8:16]]


def test_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x" * 100)
    assert [batch.shape for batch in open_rows(path, byte_tokenizer(), max_tokens=31, **SHAPE)] == [(2, 8), (1, 8)]


def test_shards_give_their_validation_split(tmp_path: Path) -> None:
    texts = [f"document number {i} of many" for i in range(40)]
    write_shards(texts, byte_tokenizer(), tmp_path / "s", validation_fraction=0.3)
    rows = torch.cat(list(open_rows(tmp_path / "s", byte_tokenizer(), max_tokens=1 << 20, **SHAPE)))
    held_out = bytes(i for i in rows.flatten().tolist() if i < 256).decode()
    kept = [text for text in texts if text in held_out]
    assert 0 < len(kept) < 40


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write_shards(["some text", "more text"], byte_tokenizer(), tmp_path / "s", validation_fraction=0.5)
    other = train_bpe(["some text more text"], 260)
    with pytest.raises(ValueError, match="another tokenizer"):
        open_rows(tmp_path / "s", other, max_tokens=100, **SHAPE)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("short")
    with pytest.raises(ValueError, match="too little text"):
        open_rows(path, byte_tokenizer(), max_tokens=1000, **SHAPE)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_rows(tmp_path / "none.txt", byte_tokenizer(), max_tokens=1000, **SHAPE)
