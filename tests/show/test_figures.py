"""Figures are well-formed SVG, drawn to scale, escaped and free of outside resources."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from mor.show.figures import Frame, Series, bar_chart, legend, line_chart, score_chart

SERIES = (
    Series(name="a <b>", points=((0, 1), (10, 2)), arm=0, dots=True),
    Series(name="c", points=((0, 2), (10, 3)), arm=1, thin=True),
)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def rects(svg: str) -> list[dict[str, float | str]]:
    return [dict(element.attrib) for element in parse(svg).iter("rect")]


def test_frame_maps_data_to_pixels() -> None:
    frame = Frame(width=200, height=100, x_range=(0, 10), y_range=(-1, 1), left=20, right=30, top=10, bottom=40)
    assert (frame.x(0), frame.x(10), frame.x(5)) == (20, 170, 95)
    assert (frame.y(-1), frame.y(1), frame.y(0)) == (60, 10, 35)


def test_line_chart_draws_every_series_and_escapes() -> None:
    svg = line_chart(SERIES, title='T "x" <y>', x_label="<x>", y_label="loss & co")
    root = parse(svg)
    assert root.attrib["aria-label"] == 'T "x" <y>'
    paths = [p.attrib["class"] for p in root.iter("path") if "line" in p.attrib["class"]]
    assert sorted(paths) == ["line arm-0", "line arm-1 thin"]
    assert len(list(root.iter("circle"))) == 2
    texts = [text.text for text in root.iter("text")]
    assert "<x>" in texts
    assert "loss & co" in texts


def test_lines_stay_inside_the_frame() -> None:
    steep = Series(name="s", points=tuple((x, 1000.0 if x == 0 else 1.0 + x / 100) for x in range(60)))
    svg = line_chart([steep], title="t", x_label="x", y_label="y", width=300, height=200)
    path = next(p.attrib["d"] for p in parse(svg).iter("path") if "line" in p.attrib["class"])
    values = [float(v) for v in re.findall(r"-?[\d.]+", path)]
    assert min(values) >= 0
    assert max(values[0::2]) <= 300
    assert max(values[1::2]) <= 200
    assert max(values[1::2]) - min(values[1::2]) > 50  # the steep first point does not flatten the rest


def test_a_flat_line_can_be_drawn() -> None:
    svg = line_chart([Series(name="s", points=((1, 2.0),))], title="t", x_label="x", y_label="y")
    assert parse(svg) is not None and "nan" not in svg


def test_points_can_stand_alone_as_rings() -> None:
    lone = Series(name="s", points=((1, 2.0), (2, 3.0)), arm=2, rings=True, joined=False)
    svg = line_chart([lone], title="t", x_label="x", y_label="y")
    assert [c.attrib["class"] for c in parse(svg).iter("circle")] == ["line ring arm-2"] * 2
    assert not [p for p in parse(svg).iter("path") if "line" in p.attrib["class"]]


def test_no_points_is_an_error() -> None:
    with pytest.raises(ValueError, match="'t' has no points"):
        line_chart([Series(name="s", points=())], title="t", x_label="x", y_label="y")


def test_bars_are_proportional() -> None:
    bars = rects(bar_chart((0, 10, 40, 20), title="t", width=640))
    lengths = [float(bar["width"]) for bar in bars]
    assert [bar["class"] for bar in bars] == ["mark depth-1", "mark depth-2", "mark depth-3"]
    assert lengths[1] == 640 - 66 - 60
    assert lengths[0] == pytest.approx(lengths[1] / 4, abs=0.1)


def test_depth_zero_is_shown_when_it_occurs() -> None:
    assert [bar["class"] for bar in rects(bar_chart((3, 1), title="t"))] == ["mark depth-0", "mark depth-1"]


def test_scores_and_thresholds() -> None:
    svg = score_chart(((0, 0, 0, 4), (1, 0, 2, 0)), (0.0, 0.75), title="t", width=400)
    bars = rects(svg)
    assert [bar["class"] for bar in bars] == ["mark depth-1", "mark depth-2", "mark depth-2"]
    assert float(bars[2]["height"]) == pytest.approx(2 * float(bars[1]["height"]), abs=0.1)
    lines = [path for path in parse(svg).iter("path") if path.attrib["class"] == "threshold"]
    assert len(lines) == 1
    assert lines[0].attrib["d"].startswith(f"M{16 + 0.75 * 368:.1f} ")
    assert "takes every token" in svg
    assert "goes on above 0.75" in svg


def test_legend_is_escaped() -> None:
    assert "&lt;b&gt;" in legend(["<b>"])
