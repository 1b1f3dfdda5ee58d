"""Token ids become text one by one, whole characters only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mor.data.tokenizer import byte_tokenizer
from mor.show.tokens import PieceDecoder, TokenView, mean_depth, subscript, visible

BYTES = byte_tokenizer()


def pieces(ids: list[int]) -> list[str]:
    decoder = PieceDecoder(BYTES)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


def test_a_character_appears_with_its_last_token() -> None:
    assert pieces(list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]


def test_an_unfinished_character_is_flushed() -> None:
    found = pieces(list("a€".encode())[:-1])
    assert found[0] == "a"
    assert found[1:3] == ["", ""]
    assert set(found[3]) == {"\ufffd"}


@given(st.text(max_size=30))
def test_pieces_make_up_the_text(text: str) -> None:
    assert "".join(pieces(list(text.encode()))) == text


@given(st.binary(max_size=30))
def test_any_bytes_can_be_shown(data: bytes) -> None:
    shown = "".join(pieces(list(data)))
    assert shown.replace("\ufffd", "") == data.decode(errors="replace").replace("\ufffd", "")


def test_small_helpers() -> None:
    assert visible("a\n") == "a↵\n"
    assert subscript(12) == "₁₂"
    assert mean_depth([]) == 0
    assert mean_depth([TokenView(text="a", depth=1), TokenView(text="b", depth=2)]) == 1.5
