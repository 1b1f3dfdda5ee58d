"""The page holds everything, escapes every text and needs nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mor.show.report import render_report, write_report
from mor.show.tokens import TokenView
from tests.show.examples import arm, report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects elements and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def test_page_is_well_formed_and_says_everything() -> None:
    page = Page(render_report(report()))
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "A <title>",
        "Lead & more",
        "Note <i>.",
        "Model <x>",
        "8 < 9",
        "Foot > er",
        "MoR",
        "2.400",
        "± 0.020",
    ):
        assert expected in text
    assert len(page.of_class("figure")) == 2 * 4  # each for two widths: two curves, depths, scores


def test_page_needs_nothing_from_outside() -> None:
    html = render_report(report())
    page = Page(html)
    names = {tag for tag, _ in page.elements}
    assert names.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "video", "audio", "source", "form"})
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "data", "poster", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", html)


def test_every_text_is_escaped() -> None:
    nasty = "</div><script>alert(1)</script>\"'&"
    shown = report(
        title=nasty,
        lead=nasty,
        text_note=nasty,
        footer=nasty,
        tokens=[TokenView(text=nasty, depth=1)],
        arms=[arm("vanilla", title=nasty)],
        settings={nasty: {nasty: nasty}},
    )
    html = render_report(shown)
    assert "<script>alert" not in html
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert nasty in "".join(page.text)


def test_tokens_carry_depth_and_probability() -> None:
    spans = Page(render_report(report())).of_class("t")
    assert [(span["data-d"], span.get("data-p")) for span in spans] == [
        ("1", None),
        ("2", "25%"),
        ("3", "<0.1%"),
        ("1", "50%"),
    ]
    assert [("given" in (span["class"] or "")) for span in spans] == [True, False, False, False]


def test_empty_parts_are_left_out() -> None:
    bare = report(arms=(), depth_counts=(), score_bins=(), thresholds=(), budgets=(), settings={})
    html = render_report(bare)
    assert Page(html).of_class("figure") == []
    assert "<table" not in html
    for heading in ("Beside its twins", "Loss curves", "How deep", "What the router", "other budgets", "Settings"):
        assert heading not in html


def test_both_themes_and_a_narrow_layout_are_there() -> None:
    html = render_report(report())
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 719px" in html
    assert 'name="viewport"' in html


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    assert write_report(report(), path) == path
    before = path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk is full"):
        write_report(report(title="other"), path)
    assert path.read_text() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
