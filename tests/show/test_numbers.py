"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.show.numbers import compact, count, duration, percent, ticks


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (0.25, "0.25"),
        (999.6, "1k"),
        (1000, "1k"),
        (1234, "1.23k"),
        (3_900_000, "3.9M"),
        (999_999, "1M"),
        (1.65e19, "16.5E"),
        (-2500, "-2.5k"),
        (math.nan, "–"),
    ],
)
def test_compact(value: float, expected: str) -> None:
    assert compact(value) == expected


def test_counts_are_in_billions() -> None:
    assert count(19.79e9) == "19.8B"
    assert count(1_738_880) == "1.74M"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(8.24, "8.2 s"), (47.4, "47 s"), (59.7, "1 min 00 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0%"), (1, "100%"), (0.335, "34%"), (0.0999, "10%"), (0.0531, "5.3%"), (0.0001, "<0.1%")],
)
def test_percent(share: float, expected: str) -> None:
    assert percent(share) == expected


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(2.31, 4.02) == [2.5, 3, 3.5, 4]
    assert ticks(3, 3) == [3]


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_lie_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)
