import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.decision import Quantile, Threshold, TopK, budget_shares


def members(tokens, shape):
    return tokens.mask(torch.Size(shape), torch.device("cpu")).tolist()


def test_top_k_counts_the_rows_tokens_and_never_takes_none():
    score = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert members(TopK(capacities=[0.75]).choose(0, score, None, 4), (1, 4)) == [[True, True, True, False]]
    assert members(TopK(capacities=[0.1]).choose(0, score, None, 4), (1, 4)) == [[True, False, False, False]]


def test_top_k_gives_padding_no_place_and_counts_real_tokens():
    score = torch.tensor([[1.0, 2.0, 9.0, 9.0], [4.0, 1.0, 3.0, 2.0]])
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    chosen = TopK(capacities=[0.5]).choose(0, score, valid, torch.tensor([2, 4]))
    assert members(chosen, (2, 4)) == [[False, True, False, False], [True, False, True, False]]


def test_thresholds_may_differ_by_row():
    score = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    rule = Threshold(thresholds=torch.tensor([[0.5], [-math.inf]]))
    assert members(rule.choose(0, score, None, 2), (2, 2)) == [[False, True], [True, True]]
    assert rule.is_causal and not TopK(capacities=[1.0]).is_causal


@given(st.integers(1, 5), st.floats(0, 1), st.data())
def test_budget_shares_add_up_and_never_rise(num_recursions, position, data):
    capacities = sorted(
        data.draw(st.lists(st.floats(0.05, 1), min_size=num_recursions - 1, max_size=num_recursions - 1))
    )
    capacities = [1.0, *capacities[::-1]]
    asked = 1 + position * (num_recursions - 1)
    shares = budget_shares(asked, capacities)
    assert math.isclose(sum(shares), asked, abs_tol=1e-9)
    assert all(a >= b - 1e-9 for a, b in pairwise(shares))
    assert shares[0] == pytest.approx(1.0)


def test_impossible_budget_says_what_is_possible():
    with pytest.raises(ValueError, match="choose between 1 and 3"):
        budget_shares(3.2, [1.0, 0.5, 0.3])


def test_quantile_finds_the_threshold_that_spends_the_share():
    score = torch.arange(10.0).view(2, 5)
    rule = Quantile(shares=[[1.0, 0.4]])
    assert rule.choose(0, score, None, 5).mask(score.shape, score.device).all()
    chosen = rule.choose(1, score, None, 5)
    assert [found.tolist() for found in rule.thresholds] == [[-math.inf], [5.5]]
    assert members(chosen, (2, 5)) == [[False] * 5, [False, True, True, True, True]]


def test_quantiles_of_parts_are_those_of_each_alone():
    score = torch.arange(20.0).view(4, 5)
    valid = torch.tensor([[True] * 5, [True] * 4 + [False], [False] * 5, [False] * 5])
    together = Quantile(shares=[[1.0, 0.4], [1.0, 0.8]])
    chosen = together.choose(1, score, valid, 5)
    alone = Quantile(shares=[[1.0, 0.4]])
    expected = members(alone.choose(1, score[:2], valid[:2], 5), (2, 5))
    assert members(chosen, (4, 5)) == [*expected, [False] * 5, [False] * 5]
    assert [found.tolist() for found in together.thresholds] == [[*alone.thresholds[0].tolist(), math.inf]]
