"""Token ids become text one by one, whole characters only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mor.data.pieces import PieceDecoder
from mor.data.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
END = 256
AWKWARD = st.text(st.sampled_from("aé€🙂\ufffd\n"), max_size=30)


class ByteChunks:
    """A tokenizer whose tokens are any runs of bytes, so that every split of a text can be tried."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def decode(self, token_ids: list[int], **_) -> str:
        return b"".join(self.chunks[token] for token in token_ids).decode(errors="replace")


@st.composite
def splits(draw: st.DrawFn, text: st.SearchStrategy[str]) -> tuple[str, list[bytes]]:
    """A text and its bytes in runs of 1 to 5."""
    whole = draw(text)
    data, chunks = whole.encode(), []
    while data:
        size = draw(st.integers(1, 5))
        chunks.append(data[:size])
        data = data[size:]
    return whole, chunks


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: spaces belong to words, unknown characters fall back to bytes."""
    names = ["<unk>", "<s>", "▁", "▁Hello", "▁world", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def pieces(ids: list[Any], tokenizer: Any = BYTES, **options: Any) -> list[str]:
    decoder = PieceDecoder(tokenizer, **options)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


def in_runs(ids: list[int], sizes: list[int], tokenizer: Any = BYTES, **options: Any) -> list[str]:
    """The text of runs of tokens of these sizes, over and over."""
    decoder, found, start, turn = PieceDecoder(tokenizer, **options), list[str](), 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        found.append(decoder.feed_all(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*found, decoder.flush()]


def test_a_character_appears_with_its_last_token() -> None:
    assert pieces(list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]


def test_an_unfinished_character_is_flushed() -> None:
    found = pieces(list("a€".encode())[:-1])
    assert found[0] == "a"
    assert found[1:3] == ["", ""]
    assert set(found[3]) == {"\ufffd"}


@given(st.text(max_size=30) | AWKWARD)
def test_pieces_make_up_the_text(text: str) -> None:
    assert "".join(pieces(list(text.encode()))) == text


@given(splits(st.text(max_size=30) | AWKWARD))
def test_any_split_of_a_text_gives_the_text_back(split: tuple[str, list[bytes]]) -> None:
    text, chunks = split
    assert "".join(pieces(list(range(len(chunks))), ByteChunks(chunks))) == text


@pytest.mark.parametrize("first", range(1, 5))
def test_tokens_that_all_end_inside_a_character(first: int) -> None:
    data = ("é€🙂aé" * 40).encode()
    edges = [0, *range(first, len(data), 3), len(data)]
    chunks = [data[start:end] for start, end in pairwise(edges)]
    assert "".join(pieces(list(range(len(chunks))), ByteChunks(chunks))) == data.decode()


@given(st.binary(max_size=30))
def test_any_bytes_can_be_shown(data: bytes) -> None:
    assert "".join(pieces(list(data))) == BYTES.decode(list(data)) == data.decode(errors="replace")


def test_no_more_than_one_character_is_held_back() -> None:
    found = pieces(list("\ufffd".encode()) * 20)
    assert "".join(found) == "\ufffd" * 20
    lengths = [len("".join(found[: count + 1])) for count in range(60)]
    assert all(length >= (count + 1) // 3 - 1 for count, length in enumerate(lengths))


def test_special_tokens_have_text_unless_skipped() -> None:
    ids = [97, END, 98]
    assert pieces(ids) == ["a", "<|endoftext|>", "b", ""]
    assert pieces(ids, skip_special_tokens=True) == ["a", "", "b", ""]


def test_a_space_before_a_word_is_part_of_the_text_after_a_prompt(words: PreTrainedTokenizerFast) -> None:
    hello, world = (words.convert_tokens_to_ids(word) for word in ("▁Hello", "▁world"))
    assert pieces([hello, world], words) == ["Hello", " world", ""]
    assert pieces([world, world], words, prompt=[hello]) == [" world", " world", ""]


def test_skipped_tokens_between_words_leave_the_space(words: PreTrainedTokenizerFast) -> None:
    hello, start, world = (words.convert_tokens_to_ids(word) for word in ("▁Hello", "<s>", "▁world"))
    for skipped in (1, 5, 50):
        assert "".join(pieces([hello, *[start] * skipped, world], words, skip_special_tokens=True)) == "Hello world"


@given(prompt=st.text(st.sampled_from("é€🙂"), max_size=30), text=st.text(st.sampled_from("é€🙂"), max_size=30))
def test_a_prompt_of_byte_tokens_changes_nothing(words: PreTrainedTokenizerFast, prompt: str, text: str) -> None:
    before, after = ([5 + byte for byte in part.encode()] for part in (prompt, text))
    assert "".join(pieces(after, words, prompt=before)) == text


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(st.text(max_size=60) | AWKWARD, SIZES)
def test_runs_of_tokens_give_the_text_of_single_ones(text: str, sizes: list[int]) -> None:
    ids = list(text.encode())
    found, single = in_runs(ids, sizes), pieces(ids)
    assert "".join(found) == "".join(single) == text
    assert len(found[0]) == len("".join(single[:-1][: sizes[0]]))  # as early as token by token


@given(st.binary(max_size=60), SIZES)
def test_runs_of_any_bytes(data: bytes, sizes: list[int]) -> None:
    assert "".join(in_runs(list(data), sizes)) == data.decode(errors="replace")


@given(st.lists(st.sampled_from("▁Hello ▁world <s> <0xC3> <0xA9> <0x41>".split()), max_size=60), SIZES)
def test_runs_of_words_and_special_tokens(words: PreTrainedTokenizerFast, names: list[str], sizes: list[int]) -> None:
    ids = [words.convert_tokens_to_ids(name) for name in names]
    single = "".join(pieces(ids, words, skip_special_tokens=True))
    assert "".join(in_runs(ids, sizes, words, skip_special_tokens=True)) == single


def test_special_tokens_between_runs_leave_the_space(words: PreTrainedTokenizerFast) -> None:
    hello, start, world = (words.convert_tokens_to_ids(word) for word in ("▁Hello", "<s>", "▁world"))
    ids = [hello, *[start] * 50, world]
    for size in (2, 7, 25, 52):
        assert "".join(in_runs(ids, [size], words, skip_special_tokens=True)) == "Hello world"


def test_a_run_costs_few_decodings() -> None:
    class Counting(ByteChunks):
        calls = 0

        def decode(self, token_ids: list[int], **_: Any) -> str:
            self.calls += 1
            return super().decode(token_ids)

    tokenizer = Counting([b"word "] * 800)
    assert "".join(in_runs(list(range(800)), [8], tokenizer)) == "word " * 800
    assert tokenizer.calls < 250
