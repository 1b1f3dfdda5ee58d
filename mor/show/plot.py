"""Curves in a terminal: a small plot of marks, one kind and colour per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from mor.show.figures import Frame, Series, y_band
from mor.show.numbers import compact
from mor.show.palette import arm_color

MARKS = "●○▲△■□◆◇"


def mark(index: int) -> Text:
    """The mark of line number `index`, in its colour of the dark theme; its shape tells lines apart without colours."""
    return Text(MARKS[index % len(MARKS)], arm_color(index, "dark"))


def line_plot(series: Sequence[Series], *, title: str, x_label: str, width: int = 72, height: int = 12) -> Text:
    """The lines over `width` columns and `height` rows of characters, with their ranges at the axes.

    As in `figures.line_chart`, the y axis covers the drawn values without a steep first fall; earlier lines lie on
    top. Raises ValueError when no series has a point.
    """
    xs = [x for line in series for x, _ in line.points]
    if not xs:
        raise ValueError(f"the plot {title!r} has no points")
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs), min(xs) + 1)
    labels = [compact(value) for value in y_band(series)]
    left = max(map(len, labels))
    margins = dict(left=0, right=1, top=0, bottom=1)  # to characters 0 ... width - 1
    frame = Frame(width=width - left - 2, height=height, x_range=x_range, y_range=y_band(series), **margins)
    cells = {place: line.arm for line in reversed(series) for place in _places(line, frame)}
    text = Text(f"{title}\n", "bold", end="")
    for row in range(height):
        label = {0: labels[1], height - 1: labels[0]}.get(row, "")
        text.append(f"{label:>{left}} │", "dim")
        for column in range(frame.width):
            arm = cells.get((column, row))
            text.append_text(Text(" ") if arm is None else mark(arm))
        text.append("\n")
    return text.append_text(_scale(x_range, x_label, left, frame.width))


def _places(line: Series, frame: Frame) -> Iterator[tuple[int, int]]:
    """The characters that a line passes, one per column from its first point to its last."""
    for (x0, y0), (x1, y1) in zip(line.points, [*line.points[1:], *line.points[-1:]]):
        first, last = round(frame.x(x0)), round(frame.x(x1))
        for column in range(first, last + 1):
            share = (column - first) / max(1, last - first)
            row = round(frame.y(y0 + (y1 - y0) * share))
            if 0 <= row < frame.height:
                yield column, row


def _scale(x_range: tuple[float, float], label: str, left: int, width: int) -> Text:
    low, high = (compact(value) for value in x_range)
    space = max(0, width - len(low) - len(high))
    return Text(f"{'':>{left}} └{'─' * width}\n{'':>{left}}  {low}{label:^{space}}{high}", "dim")
