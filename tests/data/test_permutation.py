"""A permutation sends everything somewhere and nothing twice, in an order that its key decides."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data.permutation import Permutation


@given(length=st.integers(1, 2000), key=st.text(max_size=5))
def test_it_is_a_bijection(length: int, key: str):
    order = Permutation(length, key)
    assert sorted(map(order, range(length))) == list(range(length))


def test_a_key_gives_one_order_for_ever():
    """Checkpoints hold a position in an order: changing the order of a key would break their continuation."""
    assert [Permutation(10, "0/0")(i) for i in range(10)] == [8, 2, 5, 9, 3, 7, 0, 1, 6, 4]


def test_keys_give_different_orders():
    orders = {tuple(map(Permutation(50, f"{seed}/{epoch}"), range(50))) for seed in range(9) for epoch in range(9)}
    assert len(orders) == 81


def test_short_orders_are_all_drawn():
    drawn = Counter(tuple(map(Permutation(3, str(key)), range(3))) for key in range(600))
    assert set(drawn) == set(itertools.permutations(range(3)))
    assert min(drawn.values()) > 20


def test_neighbours_are_scattered():
    length, count = 10_000, 2000
    order = Permutation(length, "a")
    places = [order(i) for i in range(count)]
    assert abs(sum(places) / count - length / 2) < length * 0.03
    far = sum(abs(a - b) > length / 10 for a, b in itertools.pairwise(places))
    assert 0.75 < far / count < 0.87
    rising = sum(a < b for a, b in itertools.pairwise(places))
    assert 0.45 < rising / count < 0.55


def test_a_thousand_million_take_no_longer():
    order = Permutation(10**9, "a")
    assert len({order(i) for i in range(1000)}) == 1000


def test_nothing_to_permute():
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        Permutation(0, "a")
