"""What an engine does before the first request and around each step."""

from __future__ import annotations

import gc
import random

import pytest

from mor.engine.collecting import collecting_later
from tests.engine.workload import engine_of, greedy, random_tokens
from tests.tiny import tiny_model


@pytest.mark.parametrize("slots", [False, True])
def test_a_warm_engine_is_as_new(slots: bool) -> None:
    model, prompt = tiny_model(), random_tokens(random.Random(0), 20)
    engines = [engine_of(model, slots=slots, seed=3) for _ in range(2)]
    engines[0].warm_up()
    assert engines[0].statistics == engines[1].statistics
    assert engines[0].pool.num_free == engines[0].pool.num_pages
    found = [engine.generate([prompt], greedy(6, temperature=1.0), progress=False)[0] for engine in engines]
    assert found[0].token_ids == found[1].token_ids  # no seed was used up
    assert [output.cached_tokens for output in found] == [0, 0]


@pytest.mark.parametrize("options", [{"max_length": 2}, {"num_pages": 3}], ids=["short", "small"])
def test_prompts_to_warm_up_with_fit_the_engine(options: dict[str, int]) -> None:
    engine = engine_of(tiny_model(), page_entries=2, **options)
    engine.warm_up_prompts()
    assert not engine.has_unfinished


def test_warming_up_waits_for_nobody() -> None:
    engine = engine_of(tiny_model())
    engine.add_request("a", [1, 2], greedy(4))
    with pytest.raises(ValueError, match="without other requests"):
        engine.warm_up_prompts()


def test_no_garbage_is_looked_for_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = engine_of(tiny_model()), list[bool]()
    plan = engine.scheduler.plan
    monkeypatch.setattr(engine.scheduler, "plan", lambda *ahead: seen.append(gc.isenabled()) or plan(*ahead))
    engine.add_request("a", [1, 2], greedy(2))
    engine.step()
    assert seen == [False] and gc.isenabled()


def test_a_step_that_breaks_off_looks_for_garbage_again() -> None:
    with pytest.raises(ZeroDivisionError), collecting_later():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_who_collects_by_hand_goes_on_to() -> None:
    gc.disable()
    try:
        with collecting_later():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
