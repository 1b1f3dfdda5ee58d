"""Figures as inline SVG, drawn by a few small functions: lines, bars and score distributions.

Nothing here names a colour: marks carry the classes `arm-0`, `arm-1`, ... and `depth-1`, `depth-2`, ..., which the
page's style sheet colours for light and dark. Sizes are in CSS pixels and a figure is never scaled, so its text keeps
its size; a page for two screen widths draws it twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mor.show.numbers import compact, percent, ticks
from mor.show.palette import arm_class, arm_dash

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its points in x order, its arm number (colour and dash), and whether it is thin or has dots.

    `rings`: dots that are not filled. `joined`: whether there is a line between the points.
    """

    name: str
    points: tuple[Point, ...]
    arm: int = 0
    thin: bool = False
    dots: bool = False
    rings: bool = False
    joined: bool = True


HALF_DIGIT = 3.7  # pixels


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plotting area and its scales: data (x_range, y_range) to pixels, y upwards."""

    width: int
    height: int
    x_range: Point
    y_range: Point
    left: int = 46
    right: int = 14
    top: int = 26
    bottom: int = 40

    def x(self, value: float) -> float:
        return self.left + _share(value, self.x_range) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return self.height - self.bottom - _share(value, self.y_range) * (self.height - self.top - self.bottom)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 640,
    height: int = 320,
    x_format: Callable[[float], str] = compact,
    y_format: Callable[[float], str] | None = None,
) -> str:
    """Lines over a light grid. The y axis covers the drawn values, not zero: losses live in a narrow band. `x_format`,
    `y_format`: how numbers stand beside the axes.

    Raises ValueError when no series has a point.
    """
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError(f"the figure {title!r} has no points")
    beside = 0.0 if all(line.joined for line in series) else 0.03  # what stands alone is not cut at the edge
    x_range = _padded([x for x, _ in points], beside)
    frame = Frame(width=width, height=height, x_range=x_range, y_range=y_band(series))
    lines = "".join(_line(frame, line) for line in reversed(series))
    return _svg(frame, title, _axes(frame, x_label, y_label, x_format, y_format) + lines)


def bar_chart(counts: Sequence[int], *, title: str, width: int = 640) -> str:
    """Horizontal bars of the share of tokens at depth 1, 2, ...; `counts[d]` tokens took depth d.

    Depth 0 is left out when no token has it.
    """
    total, depths = max(1, sum(counts)), range(0 if counts[0] else 1, len(counts))
    row, left, top = 34, 66, 6
    frame = Frame(width=width, height=2 * top + row * len(depths), x_range=(0, 1), y_range=(0, 1), left=left, right=60)
    longest = max(max(counts, default=0) / total, 1e-9)
    parts = []
    for index, depth in enumerate(depths):
        number = counts[depth]
        y, length = top + row * index, (frame.width - left - frame.right) * number / total / longest
        parts.append(
            f'<text x="{left - 10}" y="{y + 21}" text-anchor="end">depth {depth}</text>'
            f'<rect class="mark depth-{depth}" x="{left}" y="{y + 4}" width="{max(1.5, length):.1f}" '
            f'height="{row - 8}" rx="3"><title>{number:,} tokens</title></rect>'
            f'<text class="value" x="{left + length + 8:.1f}" y="{y + 21}">{percent(number / total)}</text>'
        )
    return _svg(frame, title, "".join(parts))


def score_chart(
    histograms: Sequence[Sequence[int]], thresholds: Sequence[float], *, title: str, width: int = 640
) -> str:
    """One row per recursion: the distribution of its router's scores from 0 to 1, and the threshold as a dashed line.

    `histograms[r][b]`: scored tokens in bin b of recursion r. A threshold of 0 means that every token goes on.
    """
    row, top = 88, 4
    frame = Frame(
        width=width, height=top + row * len(histograms) + 40, x_range=(0, 1), y_range=(0, 1), left=16, right=16
    )
    parts = [
        _score_row(frame, bins, threshold, index, top + row * (index + 1), row - 40)
        for index, (bins, threshold) in enumerate(zip(histograms, thresholds, strict=True))
    ]
    base = frame.height - 22
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{frame.x(value):.1f}" y="{base}" text-anchor="middle">{compact(value)}</text>')
    parts.append(f'<text x="{width / 2:.1f}" y="{base + 17}" text-anchor="middle">router score</text>')
    return _svg(frame, title, "".join(parts))


def legend(names: Sequence[str]) -> str:
    """The key of a line chart as HTML: a line sample in each arm's colour and dash, then its name."""
    samples = "".join(
        f'<span class="key"><svg width="30" height="10" aria-hidden="true">'
        f'<path class="line {arm_class(index)}" d="M1 5H29"{_dash(index)}/></svg>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="keys">{samples}</p>'


def _score_row(frame: Frame, bins: Sequence[int], threshold: float, index: int, base: float, height: float) -> str:
    total, top = max(1, sum(bins)), max(max(bins, default=0), 1)
    width = (frame.width - frame.left - frame.right) / max(1, len(bins))
    bars = "".join(
        f'<rect class="mark depth-{index + 1}" x="{frame.x(b / len(bins)):.1f}" y="{base - height * number / top:.1f}" '
        f'width="{width - 0.8:.1f}" height="{height * number / top:.1f}"><title>score {b / len(bins):.2f} to '
        f"{(b + 1) / len(bins):.2f}: {percent(number / total)}</title></rect>"
        for b, number in enumerate(bins)
        if number
    )
    axis = f'<path class="axis" d="M{frame.left} {base:.1f}H{frame.width - frame.right}"/>'
    name = f'<text class="value" x="{frame.left}" y="{base - height - 8:.1f}">recursion {index + 1}</text>'
    rule, says = "", "takes every token"
    if threshold > 0:
        x, says = frame.x(min(1.0, threshold)), f"goes on above {threshold:.3g}"
        rule = f'<path class="threshold" d="M{x:.1f} {base - height - 3:.1f}V{base:.1f}"/>'
    right, high = frame.width - frame.right, base - height - 8
    return name + bars + axis + rule + f'<text x="{right}" y="{high:.1f}" text-anchor="end">{says}</text>'


def _axes(
    frame: Frame,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str] | None,
) -> str:
    narrow = frame.width < 480
    parts = [f'<text x="2" y="13">{escape(y_label)}</text>']
    heights = ticks(*frame.y_range, target=5)
    digits = next((d for d in (3, 4, 5) if all(_fits(value, d) for value in heights)), 6)
    for value in heights:
        y, said = frame.y(value), compact(value, digits=digits) if y_format is None else y_format(value)
        parts.append(
            f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.width - frame.right}"/>'
            f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{said}</text>'
        )
    base = frame.height - frame.bottom
    for value in ticks(*frame.x_range, target=4 if narrow else 7):
        said = x_format(value)
        x = min(frame.x(value), frame.width - HALF_DIGIT * len(said))  # the last one is not cut at the edge
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{said}</text>')
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _fits(value: float, digits: int) -> bool:
    return math.isclose(float(f"{value:.{digits}g}"), value, abs_tol=1e-12)


def _line(frame: Frame, series: Series) -> str:
    if not series.points:
        return ""
    points = [(x, y) for x, y in series.points if y <= frame.y_range[1]]
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    thin = " thin" if series.thin else ""
    dash = "" if series.thin else _dash(series.arm)
    parts = [f'<path class="line {arm_class(series.arm)}{thin}" d="{path}"{dash}/>'] if series.joined else []
    if series.dots or series.rings:
        kind, radius = ("line ring", 5) if series.rings else ("dot", 3.5)
        parts += [
            f'<circle class="{kind} {arm_class(series.arm)}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
            f"<title>{escape(series.name)}: {compact(y)} at {compact(x)}</title></circle>"
            for (px, py), (x, y) in zip(places, points, strict=True)
        ]
    return "".join(parts)


def y_band(series: Sequence[Series]) -> Point:
    """The y range. Long lines are taken without their first steep fall, which would flatten all the rest; what lies
    above the range is not drawn."""
    return _padded([y for line in series for _, y in line.points[len(line.points) // 20 :]], 0.05)


def _padded(values: Sequence[float], pad: float) -> Point:
    low, high = min(values), max(values)
    margin = (high - low) * pad or (0.0 if high > low else abs(high) * 0.05 or 1.0)
    return low - margin, high + margin


def _share(value: float, bounds: Point) -> float:
    return (value - bounds[0]) / (bounds[1] - bounds[0])


def _dash(arm: int) -> str:
    dash = arm_dash(arm)
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(frame: Frame, title: str, body: str) -> str:
    return (
        f'<svg class="figure" role="img" aria-label="{escape(title, quote=True)}" width="{frame.width}" '
        f'height="{frame.height}" viewBox="0 0 {frame.width} {frame.height}">{body}</svg>'
    )
