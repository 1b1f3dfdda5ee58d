"""Factors as bars: each begins where the one before it ended, and their product from one."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mor.show.span_chart import Span, span_chart, waterfall


def test_factors_follow_one_another() -> None:
    spans = waterfall([("a", 1.5), ("b", 0.8), ("c", 1.25)], "all")
    assert [(span.name, round(span.start, 6), round(span.end, 6)) for span in spans] == [
        ("a", 1.0, 1.5),
        ("b", 1.5, 1.2),
        ("c", 1.2, 1.5),
        ("all", 1.0, 1.5),
    ]
    assert spans[1].factor == pytest.approx(0.8)


def test_equal_factors_have_bars_of_equal_length() -> None:
    spans = [
        Span(name="<x>", start=1.0, end=1.5),
        Span(name="y", start=2.0, end=3.0),
        Span(name="z", start=3.0, end=2.0),
    ]
    root = ElementTree.fromstring(span_chart(spans, title="t & u", x_label="times"))
    rects = [(float(rect.attrib["x"]), float(rect.attrib["width"])) for rect in root.iter("rect")]
    assert rects[0][1] == pytest.approx(rects[1][1], abs=0.2)
    assert rects[2] == rects[1]  # down again
    texts = [text.text for text in root.iter("text")]
    assert "<x>" in texts and texts.count("×1.50") == 2 and "×0.67" in texts and "1" in texts
    assert root.attrib["aria-label"] == "t & u"


def test_nothing_is_no_figure() -> None:
    with pytest.raises(ValueError, match="has no bars"):
        span_chart([], title="t", x_label="x")
