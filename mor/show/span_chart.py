"""Factors of a product as bars on a logarithmic scale, each from where the ones before it end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mor.show.palette import arm_class

ROW, LEFT, RIGHT, TOP, BOTTOM = 30, 226, 64, 10, 34
GRID = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
APART = 34  # pixels between two numbers below the axis


@dataclass(frozen=True, kw_only=True)
class Span:
    """A factor from `start` to `end`, both relative to the first of all. `arm`: its colour."""

    name: str
    start: float
    end: float
    arm: int = 0

    @property
    def factor(self) -> float:
        return self.end / self.start


def waterfall(factors: Sequence[tuple[str, float]], total: str, *, arm: int = 0) -> list[Span]:
    """The factors one after the other, and their product as a span of its own."""
    spans, reached = list[Span](), 1.0
    for name, factor in factors:
        spans.append(Span(name=name, start=reached, end=reached * factor, arm=arm + 1))
        reached *= factor
    return [*spans, Span(name=total, start=1.0, end=reached, arm=arm)]


def span_chart(spans: Sequence[Span], *, title: str, x_label: str, width: int = 640) -> str:
    """Horizontal bars, each with its name and factor. Raises ValueError when there are none."""
    if not spans:
        raise ValueError(f"the figure {title!r} has no bars")
    ends = [value for span in spans for value in (span.start, span.end)]
    low, high = math.log(min(1.0, *ends)), math.log(max(1.0, *ends))
    low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)
    height = TOP + ROW * len(spans) + BOTTOM

    def x(value: float) -> float:
        return LEFT + (math.log(value) - low) / (high - low) * (width - LEFT - RIGHT)

    parts = _grid(x, low, high, height)
    for number, span in enumerate(spans):
        y, left, right = TOP + ROW * number, x(min(span.start, span.end)), x(max(span.start, span.end))
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 19}" text-anchor="end">{escape(span.name)}</text>'
            f'<rect class="dot {arm_class(span.arm)}" x="{left:.1f}" y="{y + 5}" width="{max(1.5, right - left):.1f}" '
            f'height="{ROW - 10}" rx="2"><title>{escape(span.name)}: x{span.factor:.3f}</title></rect>'
            f'<text class="value" x="{right + 7:.1f}" y="{y + 19}">×{span.factor:.2f}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + width - RIGHT) / 2:.1f}" y="{height - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return (
        f'<svg class="figure" role="img" aria-label="{escape(title, quote=True)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def _grid(x: Callable[[float], float], low: float, high: float, height: int) -> list[str]:
    """Lines at round factors, with numbers where there is room; 1 always has one."""
    base, places = height - BOTTOM, [value for value in GRID if low <= math.log(value) <= high]
    numbered = [1.0]
    for value in places:
        if all(abs(x(value) - x(other)) >= APART for other in numbered):
            numbered.append(value)
    parts = [f'<path class="{"axis" if value == 1 else "grid"}" d="M{x(value):.1f} {TOP}V{base}"/>' for value in places]
    parts += [f'<text x="{x(v):.1f}" y="{base + 15}" text-anchor="middle">{v:g}</text>' for v in numbered]
    return parts
