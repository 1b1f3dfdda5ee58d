"""The plot in a terminal puts marks where the numbers are."""

from __future__ import annotations

import pytest

from mor.show.figures import Series
from mor.show.plot import line_plot, mark


def rows(*series: Series, width: int = 17, height: int = 5) -> list[str]:
    return line_plot(series, title="T (unit)", x_label="x", width=width, height=height).plain.splitlines()


def test_lines_are_drawn_to_scale() -> None:
    down, flat = (Series(name="d", points=((0, 2), (10, 1))), Series(name="f", points=((5, 1), (10, 1)), arm=1))
    assert rows(down, flat) == [
        "T (unit)",
        "2.05 │●          ",
        "     │ ●●●       ",
        "     │    ●●●    ",
        "     │       ●●● ",
        "0.95 │     ○○○○○●",
        "     └───────────",
        "      0   x    10",
    ]


def test_a_single_point_and_an_empty_line_can_be_drawn() -> None:
    drawn = rows(Series(name="one", points=((3, 2.0),)), Series(name="none", points=(), arm=1))
    assert sum(row.count("●") for row in drawn) == 1
    with pytest.raises(ValueError, match="'T \\(unit\\)' has no points"):
        rows(Series(name="none", points=()))


def test_marks_tell_eight_lines_apart() -> None:
    marks = [mark(index) for index in range(9)]
    assert len({text.plain for text in marks[:8]}) == len({str(text.style) for text in marks[:8]}) == 8
    assert marks[8] == marks[0]
