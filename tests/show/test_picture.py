"""The picture is valid SVG that shows every character in its cell."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from mor.show.picture import CELL, MARGIN, token_picture
from mor.show.tokens import TokenView
from tests.show.examples import tokens

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.attrib["class"] != "note"]


def test_tokens_stand_side_by_side() -> None:
    shown = [e for e in texts(token_picture(tokens(), 3)) if "textLength" in e.attrib]
    assert [e.text for e in shown] == ["if\u00a0a", "\u00a0<b>&", "↵", "é"]
    assert [e.attrib["class"] for e in shown] == ["i1 given", "i2", "i3", "i1"]
    assert float(shown[1].attrib["x"]) == round(MARGIN + 4 * CELL, 1)
    assert float(shown[3].attrib["x"]) == MARGIN
    assert float(shown[3].attrib["y"]) > float(shown[0].attrib["y"])


def test_long_tokens_are_wrapped() -> None:
    shown = texts(token_picture([TokenView(text="abcdefgh", depth=1)], 1, columns=3))
    assert [e.text for e in shown][:3] == ["abc", "def", "gh"]


@given(st.text(max_size=40))
def test_any_text_is_valid_xml(text: str) -> None:
    assert ElementTree.fromstring(token_picture([TokenView(text=text, depth=0)], 2)).tag.endswith("svg")


def test_it_follows_the_theme_and_needs_nothing_else() -> None:
    svg = token_picture(tokens(), 3)
    assert "prefers-color-scheme:dark" in svg
    assert svg.count("http") == 1  # the name of the SVG language
