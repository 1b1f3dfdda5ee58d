"""Planned visits while batches of the slots are in flight, and batches of other lengths, change no request."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from mor.engine.slot_runner import Progress, SlotRunner
from tests.engine.test_engine import crowd, options
from tests.engine.test_slots import slots_of
from tests.engine.workload import check_against_forward, greedy, play, random_tokens, tight_pool
from tests.tiny import KV_CACHES, tiny_model


def keep_busy(monkeypatch: pytest.MonkeyPatch, draw: random.Random, share: float) -> None:
    """Let the slots seem busy that often when the host asks, as a device behind it would be."""

    def is_busy(slots: SlotRunner) -> bool:
        return slots.in_flight > 1 and draw.random() < share

    monkeypatch.setattr(SlotRunner, "is_busy", property(is_busy))


@pytest.mark.parametrize("number", range(4))
def test_planned_visits_while_the_slots_are_busy_change_nothing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Prompts go on, are admitted and preempt others while batches are in flight."""
    draw = random.Random(number)
    keep_busy(monkeypatch, draw, 0.7)
    model = tiny_model(router="expert_choice", kv_cache=KV_CACHES[number % len(KV_CACHES)])
    jobs, settings = crowd(draw), options(draw, page_entries=draw.choice([1, 2]))
    engine = slots_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    check_against_forward(model, stories.values())


def test_batches_of_other_lengths_change_nothing() -> None:
    """What is reserved ahead, and what is left to make, follow the number of visits from batch to batch."""
    draw, model = random.Random(5), tiny_model(router="expert_choice")
    jobs, settings = crowd(draw), options(draw, page_entries=2)
    engine = slots_of(model, slot_visits=9, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    assert engine.slots is not None
    pace, collect = engine.slots._pace, engine.slots.collect

    def paced() -> Iterator[Progress]:
        pace.visits = draw.randrange(1, 10)
        return collect()

    engine.slots.collect = paced  # type: ignore[method-assign]
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    check_against_forward(model, stories.values())


def test_a_prompt_takes_its_recursions_in_one_step_while_the_slots_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, model = random.Random(0), tiny_model(router="none", num_recursions=3, sharing="middle_cycle")
    engine, prompt = slots_of(model, prefix_caching=False), random_tokens(draw, 9)
    engine.add_request("first", prompt, greedy(40))
    while engine.slots is not None and engine.slots.in_flight < 1:
        engine.step()
    keep_busy(monkeypatch, draw, 1.0)
    engine.add_request("second", prompt, greedy(40))
    engine.step()
    second = engine.scheduler.running[1]
    assert second.id == "second" and second.num_computed == len(prompt) - 1
