"""Rows of held-out text from shards and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.evaluate.text import open_held_out, open_rows

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
    with pytest.raises(ValueError, match="max_tokens=7 is too small"):
        open_rows(path, byte_tokenizer(), max_tokens=7, **SHAPE)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_rows(tmp_path / "none.txt", byte_tokenizer(), max_tokens=1000, **SHAPE)


def test_held_out_text_knows_documents_and_domains(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abcde", "kind": "x"}\n{"text": "fgh", "kind": "y"}\n{"text": "ijklmno", "kind": "x"}\n')
    options = {"sequence_length": 6, "max_tokens": 1000}
    found = open_held_out([str(path)], byte_tokenizer(), domain_field="kind", **options)
    assert found.rows_NT.flatten().tolist() == [*b"abcde", 256, *b"fgh", 256, *b"ijklmno", 256]
    assert found.document_NT.flatten().tolist() == [0] * 6 + [1] * 4 + [2] * 8
    assert found.domains == ("x", "y")
    assert found.domain_D.tolist() == [0, 1, 0]


def test_several_places_are_domains_with_documents_of_their_own(tmp_path: Path) -> None:
    for name in ("prose", "code"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "0123456789"}\n{"text": "0123456789"}\n')
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("prose", "code")]
    found = open_held_out(paths, byte_tokenizer(), sequence_length=11, max_tokens=1000)
    assert found.document_NT[:, 0].tolist() == [0, 1, 2, 3]
    assert [found.domains[n] for n in found.domain_D] == ["prose", "prose", "code", "code"]
    fewer = open_held_out(paths, byte_tokenizer(), sequence_length=11, max_tokens=22)
    assert fewer.document_NT[:, 0].tolist() == [0, 1], "each place gets half of the tokens"
    assert len(fewer.domain_D) == 2


def test_a_domain_field_needs_fields(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 100)
    options = {"sequence_length": 8, "max_tokens": 100, "domain_field": "kind"}
    with pytest.raises(ValueError, match="only files of JSON lines or parquet"):
        open_held_out([str(tmp_path / "t.txt")], byte_tokenizer(), **options)
    write_shards(["some text", "more text"], byte_tokenizer(), tmp_path / "s", validation_fraction=0.5)
    with pytest.raises(ValueError, match="token shards have no field 'kind'"):
        open_held_out([str(tmp_path / "s")], byte_tokenizer(), **options)
