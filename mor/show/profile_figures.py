"""Figures of what a trained model does: depths by kind of token and by place, similar keys, and test-time scaling.

As in `mor.show.figures`, marks carry the classes of depths and arms, which the page colours for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from mor.show.figures import Point, Series, line_chart
from mor.show.numbers import compact, percent

ROW, LABEL, TOP = 26, 128, 6


def kinds_chart(by_kind: Mapping[str, Sequence[int]], *, title: str, width: int = 640) -> str:
    """One bar per kind, divided into its shares of depths 1, 2, ..., deepest kind first, its mean depth behind it.

    `by_kind[name][d]`: tokens of depth d. Raises ValueError without tokens.
    """
    rows = sorted(((_mean(counts), name, counts) for name, counts in by_kind.items() if sum(counts)), reverse=True)
    if not rows:
        raise ValueError(f"the figure {title!r} has no tokens")
    parts = [_kind_row(name, counts, mean, TOP + ROW * n, width) for n, (mean, name, counts) in enumerate(rows)]
    return _svg(width, 2 * TOP + ROW * len(rows), title, "".join(parts))


def place_map(by_place: Sequence[Sequence[float]], place_width: int, *, title: str, width: int = 640) -> str:
    """One strip per recursion: how many of the tokens at each place of the row take it, the fuller the more; places
    that nobody takes are crossed out. `by_place[p][r]`: a share for stretch p and recursion r."""
    if not by_place:
        raise ValueError(f"the figure {title!r} has no places")
    size = (width - LABEL - 8) / len(by_place)
    parts = []
    for recursion in range(len(by_place[0])):
        y = TOP + ROW * recursion
        parts.append(_label(f"recursion {recursion + 1}", y))
        parts += [
            _place(recursion, shares[recursion], LABEL + size * n, y, size, n * place_width, place_width)
            for n, shares in enumerate(by_place)
        ]
    base = TOP + ROW * len(by_place[0]) + 14
    last = compact(len(by_place) * place_width)
    parts.append(f'<text x="{LABEL}" y="{base}">first token</text>')
    parts.append(f'<text x="{width - 8}" y="{base}" text-anchor="end">token {last} of the row</text>')
    return _svg(width, base + 8, title, "".join(parts))


def matrix_chart(matrix: Sequence[Sequence[float]], *, title: str, width: int = 316) -> str:
    """A square of numbers between -1 and 1, the fuller the more alike; nan is a dash."""
    size, left = min(64.0, (width - 100) / max(1, len(matrix))), 92
    parts = []
    for row, values in enumerate(matrix):
        parts.append(_label(f"recursion {row + 1}", TOP + size * row + size / 2 - ROW / 2, left))
        for column, value in enumerate(values):
            x, y = left + size * column, TOP + size * row
            opacity = 0.0 if math.isnan(value) else max(0.0, value)
            parts.append(
                f'<rect class="mark depth-1" x="{x:.1f}" y="{y:.1f}" width="{size - 2:.1f}" height="{size - 2:.1f}" '
                f'fill-opacity="{opacity:.2f}"/><text class="value" x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}" '
                f'text-anchor="middle">{"–" if math.isnan(value) else f"{value:.2f}"}</text>'
            )
    return _svg(width, round(2 * TOP + size * len(matrix)), title, "".join(parts))


def scaling_chart(points: Sequence[Point], num_trained: int, *, title: str, width: int = 640) -> str:
    """NLL against the number of recursions for all tokens; beyond `num_trained` as a line of its own."""
    inside = tuple(point for point in points if point[0] <= num_trained)
    outside = tuple(point for point in points if point[0] >= num_trained)
    series = [Series(name="as trained", points=inside, dots=True)]
    if len(outside) > 1:
        series.append(Series(name="beyond training", arm=1, points=outside, dots=True))
    return line_chart(series, title=title, x_label="recursions of every token", y_label="NLL, nats", width=width)


def _kind_row(name: str, counts: Sequence[int], mean: float, y: float, width: int) -> str:
    total, x, parts = sum(counts), float(LABEL), [_label(name, y)]
    room = width - LABEL - 48
    for depth, number in enumerate(counts):
        if number:
            length = room * number / total
            says = f"{escape(name)}, depth {depth}: {percent(number / total)} of {number:,} tokens"
            parts.append(
                f'<rect class="mark depth-{depth}" x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}">'
                f"<title>{says}</title></rect>"
            )
            x += length
    return "".join(parts) + f'<text class="value" x="{width - 40}" y="{y + 18}">{mean:.2f}</text>'


def _place(recursion: int, share: float, x: float, y: float, size: float, first: int, count: int) -> str:
    says = f"tokens {first + 1} to {first + count}: {percent(share)} take recursion {recursion + 1}"
    cell = (
        f'<rect class="mark depth-{recursion + 1}" x="{x:.1f}" y="{y + 2}" width="{size:.1f}" height="{ROW - 4}" '
        f'fill-opacity="{share:.2f}"><title>{says}</title></rect>'
    )
    return cell if share else cell + f'<path class="threshold" d="M{x:.1f} {y + ROW - 2}L{x + size:.1f} {y + 2}"/>'


def _label(text: str, y: float, right: float = LABEL) -> str:
    return f'<text x="{right - 8}" y="{y + 18:.1f}" text-anchor="end">{escape(text)}</text>'


def _mean(counts: Sequence[int]) -> float:
    return sum(depth * count for depth, count in enumerate(counts)) / max(1, sum(counts))


def _svg(width: int, height: int, title: str, body: str) -> str:
    return (
        f'<svg class="figure" role="img" aria-label="{escape(title, quote=True)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )
