"""Results summed up over seeds, and paired with the baseline's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mor.study.grid import StudyRun
from mor.study.results import Findings, Spread, find_results
from mor.study.studies import study
from tests.study.made_up import findings, put
from tests.study.test_grid import example

LOSSES = {"vanilla": [3.0, 4.0], "mor-3": [2.9, 3.7]}


def nll(run: StudyRun) -> float:
    return LOSSES[run.arm][run.seed]


def of_tokens(arms: tuple[str, ...] = ("vanilla", "mor-3"), seeds: tuple[int, ...] = (0, 1)) -> Findings:
    """Results of some cells at equal tokens."""
    runs = [run for run in example().runs if run.budget == "tokens" and run.arm in arms and run.seed in seeds]
    return findings(example(), nll, runs)


def test_seeds_are_summed_up_and_paired() -> None:
    vanilla, mor = of_tokens().summaries()
    assert (vanilla.arm, vanilla.budget, vanilla.nll.mean, vanilla.nll.count) == ("vanilla", "tokens", 3.5, 2)
    assert vanilla.nll.deviation == pytest.approx(math.sqrt(0.5))
    assert vanilla.difference is None and vanilla.gap is None and vanilla.top_k is None
    assert mor.difference is not None and mor.gap is not None and mor.top_k is not None and mor.gap_share is not None
    assert mor.difference.mean == pytest.approx(-0.2)
    assert mor.difference.error == pytest.approx(0.1)  # of -0.1 and -0.3
    assert mor.gap.mean == pytest.approx(0.015)
    assert mor.top_k.mean == pytest.approx((2.89 + 3.68) / 2)
    assert mor.gap_share.mean == pytest.approx((0.01 / 2.9 + 0.02 / 3.7) / 2)


def test_what_has_no_partner_is_not_compared() -> None:
    (only,) = of_tokens(arms=("mor-3",), seeds=(0,)).summaries()
    assert only.difference is None
    assert math.isnan(only.nll.deviation)
    with pytest.raises(ValueError, match="a value at least"):
        Spread.of([])


def test_arms_are_shown_by_the_seeds_that_all_have() -> None:
    both = of_tokens()
    lone = Findings(study=both.study, results=tuple(r for r in both.results if (r["arm"], r["seed"]) != ("vanilla", 1)))
    shared = lone.of_shared_seeds(["vanilla", "mor-3"], "tokens")
    assert {arm: [r["seed"] for r in group] for arm, group in shared.items()} == {"vanilla": [0], "mor-3": [0]}
    assert [r["seed"] for r in lone.of_shared_seeds(["mor-3", "no such arm"], "tokens")["mor-3"]] == [0, 1]
    apart = tuple(r for r in both.results if (r["arm"], r["seed"]) in (("vanilla", 0), ("mor-3", 1)))
    none_shared = Findings(study=both.study, results=apart).of_shared_seeds(["vanilla", "mor-3"], "tokens")
    assert {arm: [r["seed"] for r in group] for arm, group in none_shared.items()} == {"vanilla": [0], "mor-3": [1]}
    assert lone.of_shared_seeds(["vanilla"], "flops") == {}


def test_only_seeds_with_a_baseline_are_compared() -> None:
    both = of_tokens()
    lone = Findings(study=both.study, results=tuple(r for r in both.results if (r["arm"], r["seed"]) != ("vanilla", 1)))
    found = lone.summaries()[1]
    assert found.nll.count == 2
    assert found.difference is not None and found.difference.count == 1
    assert found.difference.mean == pytest.approx(-0.1)


def test_arms_named_by_size_are_compared_with_the_vanilla_model_of_that_size() -> None:
    sizes = findings(study("isoflop", 512))
    assert sizes.baseline_of("mor-3-2m") == "vanilla-2m"
    assert findings(study("gaps", 512)).baseline_of("mor-3-2m") == "mor-3-6m"
    assert of_tokens().baseline_of("mor-3") == "vanilla"


def test_results_are_found_by_the_cells_of_the_grid(tmp_path: Path) -> None:
    runs = [run for run in example().runs if run.seed == 1]
    put(example(), tmp_path, nll, runs)
    found = find_results(example(), tmp_path)
    assert [(r["arm"], r["budget"], r["seed"]) for r in found.results] == [(r.arm, r.budget, r.seed) for r in runs]
    assert found.budgets == ["tokens", "flops"]
