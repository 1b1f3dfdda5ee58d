"""Tokenizers lose no text, survive saving, and are told apart by their fingerprint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mor.data.tokenizer import (
    END_OF_TEXT,
    byte_tokenizer,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    vocabulary_size,
)

DOCUMENTS = [
    f"the {word}s of the {word}ing {word}er, number {i * 37} . don't" for i, word in enumerate(["read", "sing"])
]
AWKWARD = "  two  spaces .\n\n\tTabs, 'n' n't \r\n naïve 漢字 🙂\u200d\x00 \ufeff e\u0301 <|endoftext|> 12345 ! ?"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def make_bpe() -> PreTrainedTokenizerFast:
    return train_bpe(DOCUMENTS, 280)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_byte_ids_are_the_bytes():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(256))) + "漢🙂"
    assert ids_of(tokenizer, text) == list(text.encode())
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == vocabulary_size(tokenizer) == 257
    assert ids_of(tokenizer, END_OF_TEXT) == [256]


@pytest.mark.parametrize("make", [byte_tokenizer, make_bpe])
def test_any_text_comes_back(make):
    tokenizer = make()

    @given(text=UNICODE)
    def comes_back(text: str) -> None:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text

    comes_back()
    assert tokenizer.decode(ids_of(tokenizer, AWKWARD)) == AWKWARD


@pytest.mark.parametrize("make", [byte_tokenizer, make_bpe])
def test_saving_keeps_ids_text_and_fingerprint(make, tmp_path: Path):
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path / "saved")
    for loaded in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")):
        assert ids_of(loaded, AWKWARD) == ids_of(tokenizer, AWKWARD)
        assert loaded.decode(ids_of(loaded, AWKWARD)) == AWKWARD
        assert loaded.eos_token == END_OF_TEXT
        assert fingerprint(loaded) == fingerprint(tokenizer)


def test_a_saved_tokenizer_is_not_overwritten(tmp_path: Path):
    save_tokenizer(byte_tokenizer(), tmp_path / "saved")
    with pytest.raises(FileExistsError, match="saved exists already"):
        save_tokenizer(make_bpe(), tmp_path / "saved")


def test_bpe_merges_frequent_pairs_and_ends_documents():
    tokenizer = make_bpe()
    assert len(tokenizer) == 280
    assert tokenizer.eos_token_id == 0
    assert len(ids_of(tokenizer, DOCUMENTS[0])) < len(DOCUMENTS[0].encode())
    assert len(ids_of(tokenizer, "1234")) == 4


def test_bpe_is_the_same_in_another_process():
    program = (
        f"from mor.data.tokenizer import fingerprint, train_bpe\nprint(fingerprint(train_bpe({DOCUMENTS!r}, 280)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(make_bpe())


def test_bpe_reads_a_stream():
    assert fingerprint(train_bpe(iter(DOCUMENTS), 280)) == fingerprint(make_bpe())


def test_bpe_says_when_there_is_too_little_text():
    with pytest.warns(UserWarning, match="vocab_size=5000 was asked for, but the documents yield only"):
        train_bpe(DOCUMENTS, 5000)


def test_bpe_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_bpe(DOCUMENTS, 256)
    with pytest.raises(ValueError, match="corpus is empty"):
        train_bpe([], 300)


def test_fingerprints_differ_with_ids_and_not_with_settings():
    plain, trained = byte_tokenizer(), make_bpe()
    assert fingerprint(plain) != fingerprint(trained)
    assert fingerprint(trained) != fingerprint(train_bpe(DOCUMENTS, 281))
    padded = byte_tokenizer()
    padded(["a", "bcd"], padding=False, truncation=True, max_length=2)
    padded.model_max_length = 7
    assert fingerprint(padded) == fingerprint(plain)
    other_end = byte_tokenizer()
    other_end.add_special_tokens({"eos_token": "<end>"})
    assert fingerprint(other_end) != fingerprint(plain)


def test_load_byte_and_single_files(tmp_path: Path):
    assert fingerprint(load_tokenizer("byte")) == fingerprint(byte_tokenizer())
    save_tokenizer(make_bpe(), tmp_path / "saved")
    for name in ("tokenizer.json", "renamed.json"):
        path = tmp_path / name
        path.write_text((tmp_path / "saved" / "tokenizer.json").read_text())
        loaded = load_tokenizer(path)
        assert loaded.eos_token == END_OF_TEXT
        assert fingerprint(loaded) == fingerprint(make_bpe())


def bare_tokenizer(path: Path, words: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_the_end_of_a_document_is_found_or_asked_for(tmp_path: Path):
    known = load_tokenizer(bare_tokenizer(tmp_path / "known.json", ["?", "a", "</s>"]))
    assert known.eos_token_id == 2
    bare = bare_tokenizer(tmp_path / "bare.json", ["?", "a", "[end]"])
    with pytest.raises(ValueError, match=r"bare\.json names no token that ends a document; give eos_token"):
        load_tokenizer(bare)
    assert load_tokenizer(bare, eos_token="[end]").eos_token_id == 2
    with pytest.raises(ValueError, match="eos_token='<stop>' is not in the vocabulary"):
        load_tokenizer(bare, eos_token="<stop>")


def test_loading_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
