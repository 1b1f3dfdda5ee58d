"""Fits to isoFLOP points: the best size of a budget, and how it grows (arXiv 2203.15556, approach 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The minimum of loss = a (log10 x)^2 + b log10 x + c. `x`, `loss`: where it lies and how low. `is_inside`: between
    the smallest and the largest x that was measured; otherwise it is extrapolated and says little."""

    x: float
    loss: float
    coefficients: tuple[float, float, float]
    is_inside: bool

    def at(self, x: float) -> float:
        """The fitted loss at x."""
        a, b, c = self.coefficients
        return a * math.log10(x) ** 2 + b * math.log10(x) + c


def fit_optimum(points: Sequence[Point]) -> Optimum | None:
    """A parabola in log10 x through (x, loss) points; None when it opens downwards or there are fewer than 3 sizes."""
    xs = sorted({x for x, _ in points})
    if len(xs) < 3:
        return None
    a, b, c = np.polyfit([math.log10(x) for x, _ in points], [loss for _, loss in points], 2).tolist()
    if a <= 0:
        return None
    best = -b / (2 * a)
    inside = math.log10(xs[0]) <= best <= math.log10(xs[-1])
    return Optimum(x=10**best, loss=a * best**2 + b * best + c, coefficients=(a, b, c), is_inside=inside)


def fit_power_law(points: Sequence[Point]) -> tuple[float, float]:
    """(coefficient, exponent) of y = coefficient * x^exponent, by least squares of the logarithms.

    Raises ValueError for fewer than two different x.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError(f"a power law needs points at two x at least, got {points}")
    exponent, offset = np.polyfit([math.log10(x) for x, _ in points], [math.log10(y) for _, y in points], 1).tolist()
    return 10**offset, exponent
