"""The key below a figure that stands alone."""

from __future__ import annotations

import re

from mor.show.figure_key import with_key
from mor.show.figures import Series, line_chart

POINTS = ((0.0, 1.0), (1.0, 2.0))


def test_every_drawn_series_has_a_sample_below_the_figure() -> None:
    series = [Series(name=f"arm <{n}>", arm=n, points=POINTS) for n in range(4)]
    series += [Series(name="fit", arm=0, points=POINTS, thin=True), Series(name="empty", arm=5, points=())]
    figure = line_chart(series, title="t", x_label="x", y_label="y", width=640, height=320)
    keyed = with_key(figure, series)
    assert keyed.startswith('<svg class="figure"') and keyed.endswith("</svg>") and keyed.count("</svg>") == 1
    added = keyed.removeprefix(figure.removesuffix("</svg>")) if keyed.startswith(figure[:60]) else keyed
    names = re.findall(r'<text x="\d+" y="(\d+)">([^<]*)</text>', added)
    assert [name for _, name in names if name.startswith("arm")] == [f"arm &lt;{n}&gt;" for n in range(4)]
    assert all(int(y) > 320 for y, name in names if name.startswith("arm"))
    assert "fit" not in [name for _, name in names] and "empty" not in keyed
    assert 'height="380" viewBox="0 0 640 380"' in keyed, "two rows of up to three"
