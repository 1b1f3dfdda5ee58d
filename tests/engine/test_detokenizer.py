"""Pieces of a request's text are certain, whole and in place, and end before a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data.tokenizer import byte_tokenizer
from mor.engine.detokenizer import Detokenizer, TextPiece

BYTES = byte_tokenizer()
END = 256
LETTERS = st.text(st.sampled_from("ab€\ufffd"), max_size=20)
STOPS = st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=4), max_size=3).map(tuple)


class TextChunks:
    """A tokenizer whose token i is any text."""

    def __init__(self, chunks: list[str]) -> None:
        self.chunks = chunks

    def decode(self, token_ids: list[int], **_) -> str:
        return "".join(self.chunks[token] for token in token_ids)


def read(detokenizer: Detokenizer, tokens: list[int]) -> tuple[list[TextPiece], str]:
    """The pieces of `tokens`, and the text that was left."""
    return [detokenizer.feed(token) for token in tokens], detokenizer.finish()


def text_of(detokenizer: Detokenizer, tokens: list[int]) -> str:
    """The whole text, offsets checked."""
    pieces, rest = read(detokenizer, tokens)
    text = "".join(piece.text for piece in pieces) + rest
    for piece in pieces:
        assert text[piece.offset : piece.offset + len(piece.text)] == piece.text
    offsets = [piece.offset for piece in pieces]
    assert offsets == [sum(len(piece.text) for piece in pieces[:count]) for count in range(len(pieces))]
    return text


def before_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The rule, character by character: the text before the first stop string to end, and that string."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def split_anywhere(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(st.text(max_size=30))
def test_without_stop_strings_the_text_comes_back(text: str) -> None:
    assert text_of(Detokenizer(BYTES), list(text.encode())) == text


@given(text=LETTERS, stop=STOPS)
def test_stop_strings_across_the_bytes_of_characters(text: str, stop: tuple[str, ...]) -> None:
    detokenizer = Detokenizer(BYTES, stop)
    found = text_of(detokenizer, list(text.encode()))
    assert (found, detokenizer.stopped) == before_stop(text, stop)


@given(text=LETTERS, stop=STOPS, cuts=st.lists(st.integers(0, 99), max_size=8))
def test_the_split_into_tokens_changes_nothing(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    chunks = split_anywhere(text, cuts)
    detokenizer = Detokenizer(TextChunks(chunks), stop)
    found = text_of(detokenizer, list(range(len(chunks))))
    assert (found, detokenizer.stopped) == before_stop(text, stop)


@given(text=st.text(st.sampled_from("ab"), max_size=20), stop=STOPS)
def test_nothing_is_held_back_without_need(text: str, stop: tuple[str, ...]) -> None:
    """What is shown after each token is what no continuation could take back."""
    detokenizer = Detokenizer(BYTES, stop)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += detokenizer.feed(ord(text[end - 1])).text
        if detokenizer.stopped:
            break
        starts = [size for size in range(end + 1) if any(string.startswith(text[size:end]) for string in stop)]
        assert shown == text[: min(starts, default=end)]


def test_text_that_may_begin_a_stop_string_waits() -> None:
    detokenizer = Detokenizer(BYTES, ("<end>",))
    pieces, rest = read(detokenizer, list(b"a<en<b<e"))
    assert [piece.text for piece in pieces] == ["a", "", "", "", "<en", "<b", "", ""]
    assert [piece.offset for piece in pieces] == [0, 1, 1, 1, 1, 4, 6, 6]
    assert rest == "<e"
    assert detokenizer.stopped is None


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(BYTES, ("cd",))
    pieces, rest = read(detokenizer, list(b"abcdef"))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "", ""]
    assert pieces[-1].offset == 2
    assert rest == ""
    assert detokenizer.stopped == "cd"


def test_an_unfinished_character_is_part_of_the_rest() -> None:
    detokenizer = Detokenizer(BYTES, ("€!",))
    pieces, rest = read(detokenizer, list("a€".encode()[:-1]))
    assert [piece.text for piece in pieces] == ["a", "", ""]
    assert rest == "\ufffd"
    assert detokenizer.finish() == ""


def test_a_stop_string_may_be_an_unfinished_character() -> None:
    detokenizer = Detokenizer(BYTES, ("\ufffd",))
    assert text_of(detokenizer, [ord("a"), 0xE2]) == "a"
    assert detokenizer.stopped == "\ufffd"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    early = Detokenizer(BYTES, ("ab", "x"), min_tokens=3)
    assert text_of(early, list(b"abab")) == "ab"
    assert early.stopped == "ab"
    assert [piece.text for piece in read(Detokenizer(BYTES, ("ab",), min_tokens=2), list(b"ab"))[0]] == ["a", "b"]
    assert text_of(Detokenizer(BYTES, ("b",), min_tokens=2), list(b"ab")) == "a"


def test_special_tokens_have_no_text_unless_asked_for() -> None:
    assert text_of(Detokenizer(BYTES), [97, END, 98, END]) == "ab"
    assert text_of(Detokenizer(BYTES, skip_special_tokens=False), [97, END]) == "a<|endoftext|>"


def test_the_prompt_has_no_text() -> None:
    assert text_of(Detokenizer(BYTES, prompt=list(b"ab")), list(b"cd")) == "cd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string"):
        Detokenizer(BYTES, ("a", ""))
