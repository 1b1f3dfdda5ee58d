"""Finding what to ask for, so that what is generated has the mean depth wanted."""

from __future__ import annotations

import math
import random

import pytest

from mor.benchmark.arms import build_arm
from mor.benchmark.serving import make_engine, pages_for, serve
from mor.benchmark.settle import TRIES, bounds_of, settle, settle_workload
from mor.benchmark.workload import random_workload


@pytest.mark.parametrize("wanted", [1.02, 1.6, 2.0, 2.9])
@pytest.mark.parametrize("power", [0.4, 1.0, 6.0])
def test_whatever_rises_is_found(wanted: float, power: float) -> None:
    found = settle(lambda asked: 1 + 2 * ((asked - 1) / 2) ** power, wanted, bounds=(1.0, 3.0))
    assert found.is_close and found.generated == pytest.approx(wanted, rel=0.01)
    assert "not within" not in str(found)


def test_chance_in_few_tokens_is_lived_with() -> None:
    draw = random.Random(0)
    found = settle(lambda asked: asked + draw.uniform(-0.08, 0.08), 2.0, bounds=(1.0, 3.0))
    assert abs(found.generated - 2.0) < 0.08 and found.tries <= TRIES


def test_what_cannot_be_reached_is_said() -> None:
    found = settle(lambda asked: 1.0 if asked < 2.5 else 3.0, 2.0, bounds=(1.0, 3.0))
    assert not found.is_close and found.tries == TRIES and "not within 1%" in str(found)


@pytest.mark.parametrize("name", ["mor-3", "mor-4", "mor-3-token"])
def test_an_arm_generates_at_the_depth_wanted(name: str) -> None:
    arm = build_arm(name, "tiny", max_length=128)
    load = random_workload(num_requests=24, vocab_size=256, prompt_tokens=2, mean=40, deviation=8)
    engine = make_engine(arm, concurrency=8, num_pages=pages_for(arm, 8, load.longest))
    found = settle_workload(arm, engine, load, most_tokens=10_000, temperature=1.0)
    assert arm.wanted_depth == (arm.model.config.num_recursions + 1) / 2
    assert found.is_close
    assert serve(engine, load, mean_depth=found.asked).mean_depth == pytest.approx(found.generated)
    assert math.isclose(bounds_of(arm)[0], 1.0) and bounds_of(arm)[1] == arm.model.config.num_recursions
