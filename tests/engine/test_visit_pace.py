"""How many visits make a batch, on a clock that is made up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mor.engine.options import EngineOptions
from mor.engine.setup import _pace
from mor.engine.visit_pace import VisitPace
from tests.engine.test_slots import slots_of
from tests.engine.workload import greedy, random_tokens
from tests.tiny import tiny_model

MOST, BATCHES = 16, 400


def play(pace: VisitPace, visit: float, work: Callable[[int], float]) -> Iterator[tuple[int, float]]:
    """A host that queues each batch behind the one in flight, and a device that makes one visit in `visit` seconds.
    Yields the visits of each batch that ended and how long the device stood still before it began."""
    now, free, ended = 0.0, 0.0, 0.0
    flight: list[tuple[int, float, float]] = []
    for step in range(BATCHES):
        now += work(step)
        idle = max(0.0, now - free) if flight else 0.0
        free = max(free, now) + pace.visits * visit
        flight.append((pace.visits, free, idle))
        if len(flight) > 1:
            visits, arrived, idle = flight.pop(0)
            worked, waited = now - ended, max(0.0, arrived - now)
            now = ended = max(now, arrived)
            pace.saw(visits, worked=worked, waited=waited)
            yield visits, idle


@pytest.mark.parametrize(("visit", "work", "expected"), [(2, 5, 5), (2, 0.4, 1), (0.7, 3, 9), (20, 5, 1)])
def test_as_few_visits_as_hide_the_hosts_work(visit: float, work: float, expected: int) -> None:
    """Twice the host's work, rounded up, and the device never waits."""
    last = list(play(VisitPace(MOST), visit, lambda step: work))[BATCHES // 2 :]
    assert {visits for visits, _ in last} == {expected}
    assert sum(idle for _, idle in last) == 0


def test_a_host_that_is_too_slow_for_any_number_gets_the_most() -> None:
    assert {visits for visits, _ in play(VisitPace(MOST), 0.1, lambda step: 9)} == {MOST}


def test_the_first_batch_may_have_fewer_visits_than_the_most() -> None:
    pace = VisitPace(MOST, first=5)
    assert pace.visits == 5
    assert [visits for visits, _ in play(pace, 0.1, lambda step: 9)][-1] == MOST


@pytest.mark.parametrize(("most_requests", "first", "most"), [(64, 8, 8), (65, 16, 16), (512, 16, 16), (513, 16, 32)])
def test_many_requests_may_have_more_visits_in_a_batch(most_requests: int, first: int, most: int) -> None:
    pace = _pace(torch.device("cuda"), EngineOptions(), most_requests)
    assert (pace.visits, pace.most) == (first, most)
    fixed = _pace(torch.device("cuda"), EngineOptions(slot_visits=9), most_requests)
    assert {visits for visits, _ in play(fixed, 0.1, lambda step: 9)} == {9}


def test_work_that_varies_is_hidden_for_the_most_part() -> None:
    """Every tenth step takes three times as long, as prompts do, and others a little more or less."""
    draw = random.Random(0)
    steps = list(play(VisitPace(MOST), 1, lambda step: draw.uniform(1, 2) * (3 if step % 10 == 0 else 1)))
    half = steps[BATCHES // 2 :]
    assert max(visits for visits, _ in half) < MOST
    assert sum(idle for _, idle in half) <= 0.01 * sum(visits for visits, _ in half)


def test_more_work_is_hidden_again_at_once() -> None:
    steps = list(play(VisitPace(MOST), 1, lambda step: 1 if step < BATCHES // 2 else 6))
    before, after = steps[BATCHES // 2 - 10], steps[BATCHES // 2 + 10 :]
    assert before[0] == 2 and {visits for visits, _ in after} == {12}
    assert sum(idle for _, idle in after) == 0


def test_a_number_that_is_asked_for_stays() -> None:
    assert {visits for visits, _ in play(VisitPace(5, 5), 1, lambda step: 9 if step % 2 else 0.1)} == {5}


@pytest.mark.parametrize(("most", "least", "first"), [(0, 1, None), (4, 0, None), (3, 4, None), (4, 2, 1), (4, 2, 5)])
def test_impossible_numbers_are_refused(most: int, least: int, first: int | None) -> None:
    with pytest.raises(
        ValueError, match=f"at least {least} and at most {most} visits, the first one of {first or most}"
    ):
        VisitPace(most, least, first=first)


@dataclass
class Device:
    """A clock, and when the device will have done what was queued."""

    visit: float
    now: float = 0.0
    free: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def queue(self, visits: int) -> Event:
        self.free = max(self.free, self.now) + visits * self.visit
        return Event(self, self.free)


@dataclass
class Event:
    device: Device
    at: float

    def query(self) -> bool:
        return self.device.now >= self.at

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)


@pytest.mark.parametrize(("visit", "plan", "meanwhile", "expected"), [(2, 3, 0, 3), (2, 0.5, 0, 1), (2, 0.5, 1, 1)])
def test_an_engine_measures_its_work_and_its_waiting(
    monkeypatch: pytest.MonkeyPatch, visit: float, plan: float, meanwhile: float, expected: int
) -> None:
    """Planning takes time. What is done while the slots are busy would be waiting else, and does not count."""
    device, draw = Device(visit), random.Random(0)
    engine = slots_of(tiny_model(router="none"), slot_visits=8, prefix_caching=False, max_requests=2)
    assert engine.slots is not None
    slots = engine.slots
    slots._pace = VisitPace(8)
    monkeypatch.setattr("mor.engine.slot_runner.time", device)
    sent, plans = slots._sent, engine.scheduler.plan

    def sent_later(visits: int) -> Any:
        return *sent(visits)[:2], device.queue(visits)

    def planned(ahead: int = 0, least: int = 0) -> Any:
        device.now += plan if ahead else meanwhile
        return plans(ahead, least)

    monkeypatch.setattr(slots, "_sent", sent_later)
    monkeypatch.setattr(engine.scheduler, "plan", planned)
    engine.add_request("long", random_tokens(draw, 3), greedy(200, ignore_eos=True))
    used = list[int]()
    while engine.has_unfinished:
        engine.step()
        used.append(slots._pace.visits)
    assert used[0] == 8 and used[-20:] == [expected] * 20
