"""Grids, budgets and the studies known by name."""

from __future__ import annotations

import pytest

from mor.model.configuration_mor import MorConfig
from mor.model.cost import complete_flops
from mor.study.grid import Budget, Measurement, Recipe, Study, distinct, grid, only
from mor.study.studies import STUDIES, mor, names, study, vanilla

VOCABULARY = 512
ARMS = {"vanilla": vanilla(64, VOCABULARY), "mor-3": mor(64, VOCABULARY)}
RECIPE = Recipe(sequence_length=64, rows=4)


def example(**changes: object) -> Study:
    budgets = [Budget(name="tokens", steps=10), Budget(name="flops", flops=2e11)]
    runs = grid(ARMS, seeds=(0, 1), budgets=budgets, recipe=RECIPE)
    return Study(**{"name": "example", "question": "?", "runs": runs, "baseline": "vanilla"} | changes)  # type: ignore[arg-type]


def test_a_grid_has_every_combination_once_and_the_first_seed_first() -> None:
    runs = example().runs
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 2
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert runs[1].name == "mor-3--tokens--seed-0"
    assert runs[1].key.startswith("expert-choice-3-64x14-10-seed-0-")
    assert len({run.key for run in runs}) == len(runs)
    assert [run.options.training.seed for run in runs] == [run.seed for run in runs]
    assert runs[1].options.model["router"] == "expert_choice"


def test_equal_flops_buy_each_arm_its_own_steps() -> None:
    runs = {run.arm: run.options.training.steps for run in example().runs if run.budget == "flops"}
    spent = {arm: steps * 4 * complete_flops(MorConfig(**ARMS[arm]), 64) for arm, steps in runs.items()}
    assert runs["mor-3"] > runs["vanilla"]
    for flops in spent.values():
        assert flops == pytest.approx(2e11, rel=0.5 / runs["vanilla"])
    assert {run.options.training.steps for run in example().runs if run.budget == "tokens"} == {10}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        Budget(name="both", steps=1, flops=1.0)
    with pytest.raises(ValueError, match="baseline 'llama' is no arm of 'example': vanilla, mor-3"):
        example(baseline="llama")
    with pytest.raises(ValueError, match="two runs named 'vanilla--tokens--seed-0'"):
        example(runs=example().runs[:1] * 2)
    with pytest.raises(ValueError, match="unknown study 'twin'; did you mean 'twins'"):
        study("twin", VOCABULARY)


def test_only_keeps_the_baseline() -> None:
    runs = only(example(), arms=["mor-3"], seeds=[1]).runs
    assert {run.arm for run in runs} == {"vanilla", "mor-3"}
    assert {run.seed for run in runs} == {1}
    with pytest.raises(ValueError, match="no arm 'x'; it has mor-3, vanilla"):
        only(example(), arms=["x"])
    with pytest.raises(ValueError, match="no seed 7; it has 0, 1"):
        only(example(), seeds=[7])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_made_of_models_that_exist(name: str) -> None:
    found = study(name, VOCABULARY)
    assert found.name == name
    for run in found.runs:
        assert MorConfig(**run.options.model).vocab_size == VOCABULARY
        assert run.options.training.steps >= 1


def test_equal_cells_are_one_run() -> None:
    twins, controls = study("twins", 8192), study("controls", 8192)
    named = {run.name: run for run in (*twins.runs, *controls.runs)}
    assert named["vanilla--equal-tokens--seed-1"].key == named["vanilla--equal-flops--seed-1"].key
    assert named["mor-3--equal-tokens--seed-0"].key != named["mor-3--equal-flops--seed-0"].key
    both = distinct([twins, controls])
    assert len(both) < len({run.name for run in twins.runs} | {run.name for run in controls.runs})
    assert named["mor-3--equal-flops--seed-2"].key in {run.key for run in both}


def test_depths_of_the_dial() -> None:
    assert Measurement().mean_depths(3) == [1, 1.05, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 2.95, 3]
    assert Measurement(dial_step=1).mean_depths(1) == [1]


def test_names() -> None:
    assert names(["twins", "all"])[:2] == ["twins", "controls"]
    assert "smoke" not in names(["all"])
