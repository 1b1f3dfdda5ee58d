"""Fits recover the curves that points were made from."""

from __future__ import annotations

import math

import pytest

from mor.study.fits import fit_optimum, fit_power_law


def parabola(x: float, best: float = 1e7) -> float:
    return 3.0 + 0.4 * (math.log10(x) - math.log10(best)) ** 2


def test_the_optimum_of_a_parabola() -> None:
    fit = fit_optimum([(x, parabola(x)) for x in (2e6, 6e6, 3e7)])
    assert fit is not None
    assert fit.x == pytest.approx(1e7, rel=1e-6)
    assert fit.loss == pytest.approx(3.0)
    assert fit.is_inside
    assert fit.at(4e6) == pytest.approx(parabola(4e6))


def test_an_optimum_beyond_the_points_is_called_so() -> None:
    fit = fit_optimum([(x, parabola(x, best=1e9)) for x in (2e6, 6e6, 3e7)])
    assert fit is not None and not fit.is_inside
    assert fit_optimum([(x, -parabola(x)) for x in (2e6, 6e6, 3e7)]) is None
    assert fit_optimum([(1e6, 3.0), (1e6, 3.1), (2e6, 2.9)]) is None


def test_a_power_law() -> None:
    coefficient, exponent = fit_power_law([(x, 5 * x**-0.3) for x in (1e3, 1e5, 1e6)])
    assert coefficient == pytest.approx(5)
    assert exponent == pytest.approx(-0.3)
    with pytest.raises(ValueError, match="two x at least"):
        fit_power_law([(1.0, 2.0), (1.0, 3.0)])
