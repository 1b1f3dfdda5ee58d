"""Lengths and pages follow from depths."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.engine.cache_shape import CacheShape

SHARED = CacheShape(
    num_recursions=3,
    tokens_per_page=(4, 4, 4, 6),
    holds_all=(True, False, False, True),
    written=(True, False, False, True),
)
OWN = CacheShape(
    num_recursions=3, tokens_per_page=(4, 4, 2, 6), holds_all=(False, False, False, True), written=(True,) * 4
)


def test_lengths_count_the_tokens_of_each_recursion() -> None:
    depths = [0, 1, 3, 2, 1]
    assert OWN.lengths(depths) == [4, 2, 1, 5]
    assert SHARED.lengths(depths) == [5, 0, 0, 5]


def test_a_visit_fills_its_recursion_and_on_entering_the_unshared_layers() -> None:
    assert OWN.growing == ((0, 3), (1,), (2,))
    assert SHARED.growing == ((0, 3), (), ())
    at_once = CacheShape(
        num_recursions=2, tokens_per_page=(4, 4, 6), holds_all=(True,) * 3, written=(True,) * 3, one_visit=True
    )
    assert at_once.growing == ((0, 1, 2),)


@given(st.lists(st.integers(0, 3), max_size=40), st.data())
def test_no_depths_need_more_than_the_worst_case(depths: list[int], data: st.DataObject) -> None:
    computed = data.draw(st.integers(0, len(depths)))
    for shape in (OWN, SHARED):
        pages = sum(shape.pages(s, length) for s, length in enumerate(shape.lengths(depths)))
        known = shape.worst_pages(len(depths), shape.lengths(depths[:computed]), computed)
        assert pages <= known <= shape.worst_pages(len(depths))


@given(st.integers(0, 60))
def test_most_tokens_is_the_largest_number_that_fits(num_pages: int) -> None:
    for shape in (OWN, SHARED):
        most = shape.most_tokens(num_pages)
        assert shape.worst_pages(most) <= num_pages < shape.worst_pages(most + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_recursions": 0}, "num_recursions=0 must be at least 1"),
        ({"num_recursions": 2}, "must each have num_recursions=2 values"),
        ({"written": (True,) * 3}, "must each have num_recursions=3 values"),
        ({"tokens_per_page": (4, 0, 4, 4)}, "tokens_per_page=.* must be at least 1"),
        ({"holds_all": (True, False, False, False)}, "must be True for the unshared layers"),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {name: getattr(OWN, name) for name in ("num_recursions", "tokens_per_page", "holds_all", "written")}
    with pytest.raises(ValueError, match=message):
        CacheShape(**(fields | change))
