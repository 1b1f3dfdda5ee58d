import math

import pytest

from mor.train.options import RunOptions, ScheduleOptions, TrainingOptions
from mor.train.schedule import Cosine, Trapezoid, build_schedule


def schedule(steps: int, **options):
    return build_schedule(RunOptions(training=TrainingOptions(steps=steps), schedule=ScheduleOptions(**options)))


def test_trapezoid_follows_the_papers_formula_at_every_step():
    """Warm-up t/w, plateau 1, decay 1 - (t-p)/d; 360M vanilla: w = 57, p = 9438 - 1888, d = 1888."""
    factor = schedule(9438, warmup_steps=57).factor
    for step in range(9438):
        if step < 57:
            expected = step / 57
        elif step < 7550:
            expected = 1.0
        else:
            expected = 1 - (step - 7550) / 1888
        assert factor(step) == expected
    assert factor(9437) == pytest.approx(1 / 1888)
    assert factor(9438) == factor(20000) == 0.0


@pytest.mark.parametrize(("steps", "decay"), [(9438, 1888), (8883, 1777), (12619, 2524), (14161, 2832), (14672, 2934)])
def test_default_decay_is_a_fifth_rounded_as_in_the_published_runs(steps, decay):
    assert schedule(steps, warmup_steps=57) == Trapezoid(warmup_steps=57, decay_start=steps - decay, decay_steps=decay)


def test_default_warmup_is_a_twentieth():
    assert schedule(1144, kind="cosine") == Cosine(warmup_steps=57, steps=1144, minimum_ratio=0.1)
    assert schedule(1717, kind="cosine").warmup_steps == 86


def test_cosine_falls_from_one_to_the_minimum_ratio():
    factor = schedule(1100, kind="cosine", warmup_steps=100).factor
    assert factor(0) == 0.0
    assert factor(50) == 0.5
    assert factor(100) == 1.0
    assert factor(600) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(350) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert factor(1100) == factor(5000) == pytest.approx(0.1)


def test_zero_lengths_are_allowed():
    flat = schedule(10, warmup_steps=0, decay_steps=0).factor
    assert [flat(step) for step in (0, 5, 9, 10)] == [1.0, 1.0, 1.0, 0.0]
    assert schedule(10, kind="cosine", warmup_steps=10).factor(10) == 1.0
