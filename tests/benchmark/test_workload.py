"""Workloads: lengths, prompts and arrivals."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from mor.benchmark.workload import Workload, normal_length, poisson_arrivals, random_workload, text_workload

SHAPE = dict(num_requests=400, prompt_tokens=3, mean=20.0, deviation=12.0)


def test_lengths_are_normal_and_bounded() -> None:
    load = random_workload(vocab_size=50, **SHAPE)  # type: ignore[arg-type]
    assert min(load.lengths) >= 1
    assert max(load.lengths) <= 39
    assert statistics.fmean(load.lengths) == pytest.approx(20, abs=1.5)
    assert statistics.stdev(load.lengths) == pytest.approx(9.8, abs=1.5)  # of the truncated distribution
    assert all(len(prompt) == 3 and all(0 <= token < 50 for token in prompt) for prompt in load.prompts)
    assert load.longest == 3 + max(load.lengths)
    assert load.first(2).num_tokens == sum(load.lengths[:2])


def test_a_queue_that_has_long_been_served() -> None:
    load = Workload(prompts=((1,), (2,), (3,)), lengths=(9, 12, 30))
    assert load.at_least(5).lengths == (9, 12, 30, 9, 12) and load.at_least(2) == load
    assert load.staggered(3).lengths == (3, 8, 30) and load.staggered(1) == load
    assert load.shortened(10).lengths == (9, 10, 10)
    assert load.mean == 18


def test_equal_seeds_give_equal_work() -> None:
    again = [random_workload(vocab_size=50, seed=seed, **SHAPE) for seed in (1, 1, 2)]  # type: ignore[arg-type]
    assert again[0] == again[1] != again[2]


def test_no_deviation_gives_equal_lengths() -> None:
    assert {normal_length(random.Random(n), 7, 0) for n in range(5)} == {7}


def test_prompts_of_text_begin_its_rows_in_turn() -> None:
    load = text_workload([[1, 2, 3, 4], [5, 6, 7, 8]], num_requests=3, prompt_tokens=2, mean=5, deviation=0)
    assert load.prompts == ((1, 2), (5, 6), (1, 2))


def test_arrivals_are_poisson() -> None:
    times = poisson_arrivals(2000, 4.0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.15)
