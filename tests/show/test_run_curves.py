"""Curves stand where their tokens, FLOPs and hours are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.show.run_curves import BITS_PER_BYTE, CAUSAL_NLL, MOST_POINTS, TRAINING_LOSS, axes, curve, curves
from mor.show.runs import read_runs
from tests.show.examples import evaluation_line, training_line, write_run


def test_every_axis(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "r", training_line(5, loss=3.0), training_line(10, loss=2.0))])
    tokens, flops, time = axes([run])
    assert curve(run, TRAINING_LOSS, tokens) == ((500, 3.0), (1000, 2.0))
    assert curve(run, TRAINING_LOSS, flops) == ((5e8, 3.0), (1e9, 2.0))
    assert curve(run, TRAINING_LOSS, time) == ((50 / 60, 3.0), (100 / 60, 2.0))
    assert (time.name, time.label) == ("minutes", "minutes of training")


def test_long_runs_are_in_hours_all_of_them(tmp_path: Path) -> None:
    short = write_run(tmp_path / "s", training_line(5, seconds=1800.0))
    long = write_run(tmp_path / "l", training_line(5, seconds=7200.0))
    runs = read_runs([short, long])
    time = axes(runs)[2]
    assert time.name == "hours"
    assert [line.points for line in curves(runs, TRAINING_LOSS, time)] == [((0.5, 2.0),), ((2.0, 2.0),)]


def test_evaluations_are_placed_between_training_lines_and_beyond(tmp_path: Path) -> None:
    evaluations = [evaluation_line(step, nll=step) for step in (5, 15, 25)]
    lines = [evaluations[0], training_line(10, seconds=600.0, flops=10.0), evaluations[1]]
    lines += [training_line(20, seconds=2400.0, flops=40.0), evaluations[2]]
    (run,) = read_runs([write_run(tmp_path / "r", *lines)])
    tokens, flops, time = axes([run])
    assert curve(run, CAUSAL_NLL, tokens) == ((500, 5), (1500, 15), (2500, 25))
    assert curve(run, CAUSAL_NLL, flops) == ((5, 5), (25, 15), (55, 25))
    assert curve(run, BITS_PER_BYTE, time) == ((5, 2.5), (25, 7.5), (55, 12.5))


def test_what_was_not_recorded_is_not_drawn(tmp_path: Path) -> None:
    old = training_line(5)
    del old["flops"]
    runs = read_runs([write_run(tmp_path / "old", old, evaluation_line(5)), write_run(tmp_path / "begun")])
    tokens, flops, _ = axes(runs)
    assert [len(line.points) for line in curves(runs, TRAINING_LOSS, flops)] == [0, 0]
    assert [len(line.points) for line in curves(runs, CAUSAL_NLL, flops)] == [0, 0]
    assert [len(line.points) for line in curves(runs, CAUSAL_NLL, tokens)] == [1, 0]


def test_long_curves_become_means_of_neighbours(tmp_path: Path) -> None:
    lines = [training_line(step, loss=float(step)) for step in range(1, 2 * MOST_POINTS + 2)]
    (run,) = read_runs([write_run(tmp_path / "r", *lines)])
    points = curve(run, TRAINING_LOSS, axes([run])[0])
    assert len(points) == pytest.approx(MOST_POINTS * 2 / 3, abs=1)
    assert points[0] == (200, 2.0)
    assert points[-1] == (80000, 800.0)
