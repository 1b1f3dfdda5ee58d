"""Pages of requests in slots: reckoned at once they are what each request's own rule says, and no slot writes beyond
those it knows, whoever comes, ends or gives way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mor.engine.block_pool import BlockPool
from mor.engine.cache_shape import CacheShape
from mor.engine.limits import Limits
from mor.engine.prefix_cache import PrefixCache
from mor.engine.request import Request, Segment, SegmentResult
from mor.engine.scheduler import Plan, Scheduler
from mor.engine.slot_pages import SlotPages
from tests.engine.simulation import request, small_shape

RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Slot:
    """What a device knows of a request: its pages and entries, how far its token is, and the tokens left."""

    request: Request
    epoch: int
    tables: list[list[int]]
    lengths: list[int]
    left: int
    fresh: bool = True
    recursion: int = 0
    depth: int = 0
    said: list[int] = field(default_factory=list)

    @property
    def is_here(self) -> bool:
        return self.request.state == "running" and self.request.num_preemptions == self.epoch

    def visit(self, draw: random.Random, shape: CacheShape) -> None:
        """A token that is through is sampled, the next one enters, and it takes a recursion."""
        if not self.left:
            return
        if self.fresh or self.recursion == self.depth:
            if not self.fresh:
                self.said.append(self.depth)
                self.left -= 1
            self.fresh, self.recursion, self.depth = False, 0, draw.randint(1, shape.num_recursions)
            if not self.left:
                return
            self._write(shape, shape.num_recursions)
        self._write(shape, self.recursion)
        self.recursion += 1

    def _write(self, shape: CacheShape, sequence: int) -> None:
        if sequence < shape.num_sequences:
            self.lengths[sequence] += 1
            assert self.lengths[sequence] <= len(self.tables[sequence]) * shape.tokens_per_page[sequence]


@dataclass(kw_only=True)
class Drive:
    """A scheduler driven as an engine with slots does: what a batch did is entered when the next one is queued."""

    scheduler: Scheduler
    pool: BlockPool
    draw: random.Random
    slots: dict[Request, Slot] = field(default_factory=dict)
    depths: dict[Segment, list[int]] = field(default_factory=dict)
    flight: list[tuple[int, list[tuple[Slot, list[int], list[int]]]]] = field(default_factory=list)
    plans: list[Any] = field(default_factory=list)

    def step(self) -> None:
        in_flight, visits = sum(count for count, _ in self.flight), self.draw.randint(1, 9)
        least = self.draw.randint(1, visits)
        plan = self.scheduler.plan(visits + in_flight, least + in_flight)
        visits = plan.ahead - in_flight
        assert least <= visits <= 9
        self.plans.append(
            [[r.id for r in plan.decoding], [r.id for r in plan.preempted], [s.request.id for s in plan.segments]]
        )
        self.plans.append([[*map(len, r.pages)] for r in self.scheduler.running])
        self._queue(plan, visits)
        for segment in plan.segments:
            self.scheduler.complete(segment, self._result(segment))
        if len(self.flight) > 1 or not plan.decoding:
            self._collect()

    def _queue(self, plan: Plan, visits: int) -> None:
        self.slots = {found: slot for found, slot in self.slots.items() if slot.is_here}
        for found, sequence, number, pages in plan.grown:
            if found in self.slots:
                table = self.slots[found].tables[sequence]
                assert len(table) == number
                table += pages
        for found in plan.decoding:
            if found not in self.slots:
                tables, left = [[*pages] for pages in found.pages], found.params.max_tokens - len(found.output)
                self.slots[found] = Slot(found, found.num_preemptions, tables, [*found.lengths], left)
            assert self.slots[found].tables == found.pages
        taking_part = list[tuple[Slot, list[int], list[int]]]()
        for slot in self.slots.values():
            for _ in range(visits):
                slot.visit(self.draw, self.scheduler.shape)
            taking_part.append((slot, slot.said, [*slot.lengths]))
            slot.said = []
        if taking_part:
            self.flight.append((visits, taking_part))

    def _collect(self) -> None:
        for slot, depths, lengths in self.flight.pop(0)[1] if self.flight else []:
            if slot.is_here:
                found = slot.request
                self.scheduler.advance(found, [len(found.output) + n for n, _ in enumerate(depths)], depths, lengths)
                if len(found.output) == found.params.max_tokens:
                    self.scheduler.finish(found, "length")

    def _result(self, segment: Segment) -> SegmentResult:
        shape, visited = self.scheduler.shape, segment.recursion
        if not segment.entered:
            self.depths[segment] = [self.draw.randint(1, shape.num_recursions) for _ in range(segment.count)]
        depths = self.depths[segment]
        added = [0] * shape.num_sequences
        added[visited] = segment.active
        for outer in range(shape.num_recursions, shape.num_sequences):
            added[outer] = 0 if segment.entered else segment.count
        active = sum(depth > visited + 1 for depth in depths)
        return SegmentResult(added=tuple(added), active=active, depths=() if active else tuple(depths))

    def check(self) -> None:
        """No page is lost or held twice by chance."""
        held = Counter(page for r in self.scheduler.running for pages in r.pages for page in pages)
        cache = self.scheduler._prefix_cache
        if cache is not None:
            held.update(page for node in cache.nodes() for pages in node.pages for page in pages)
        assert all(self.pool.references(page) == held[page] for page in range(self.pool.num_pages))


def driven(seed: int, *, has_prefixes: bool = False) -> Drive:
    """Requests that come while others run, on a pool that does not hold them all."""
    draw = random.Random(seed)
    shape = small_shape(draw.randint(1, 4), outer=draw.random() < 0.7, size=draw.choice([1, 2, 4, 7]))
    limits = Limits(
        max_requests=draw.randint(1, 9),
        max_visit_tokens=draw.choice([8, 64]),
        prefill_chunk=8,
        max_length=48,
        room_to_grow=draw.choice([0, 3, 20]),
    )
    lengths = [(draw.randint(1, 20), draw.randint(1, 25)) for _ in range(draw.randint(1, 14))]
    spare = draw.choice([0, 5, 40, 400])
    pool = BlockPool(spare + max(shape.worst_pages(size + most) for size, most in lengths))
    cache = PrefixCache(pool, shape, granularity=4) if has_prefixes else None
    scheduler = Scheduler(shape=shape, limits=limits, pool=pool, prefix_cache=cache)
    drive = Drive(scheduler=scheduler, pool=pool, draw=draw)
    for number, (size, most) in enumerate(lengths):
        found = request(f"r{number}", [draw.randint(0, 1) if has_prefixes else number] * size, max_tokens=most)
        found.in_slot = True
        scheduler.add(found)
        for _ in range(draw.choice([0, 0, 1, 5])):
            drive.step()
    return drive


def finish(drive: Drive) -> None:
    for _ in range(5000):
        if not drive.scheduler.num_running + drive.scheduler.num_waiting:
            return
        drive.step()
        drive.check()
    raise AssertionError("the requests do not end")


@RANDOM
@given(st.integers(0, 10**9), st.booleans())
def test_slots_know_the_pages_they_write_to_and_every_request_ends(seed: int, has_prefixes: bool) -> None:
    finish(driven(seed, has_prefixes=has_prefixes))


def lacks_of(shape: CacheShape, found: Request, visits: int) -> list[tuple[int, int]]:
    most, growths = len(found.prompt) + found.params.max_tokens - 1, shape.growths(visits)
    wanted = [shape.pages(s, min(most, found.lengths[s] + growths[s])) for s in range(shape.num_sequences)]
    lacks = [(s, pages - len(found.pages[s])) for s, pages in enumerate(wanted)]
    return [(s, count) for s, count in lacks if count > 0]


@RANDOM
@given(st.integers(0, 10**9), st.integers(0, 60))
def test_what_many_lack_is_what_each_lacks(seed: int, visits: int) -> None:
    scheduler = driven(seed).scheduler
    decoding = [found for found in scheduler.running if found.is_decoding_alone]
    each = {found: lacks_of(scheduler.shape, found, visits) for found in decoding}
    if decoding:
        assert SlotPages(scheduler.shape, decoding).lacks(visits) == {
            found: lacks for found, lacks in each.items() if lacks
        }


def two_that_decode(num_pages: int) -> Scheduler:
    """With the tokens of their prompts computed, on pages of 2 entries, of which each holds 2."""
    limits = Limits(max_requests=4, max_visit_tokens=64, prefill_chunk=8, max_length=48)
    scheduler = Scheduler(shape=small_shape(1, outer=False, size=2), limits=limits, pool=BlockPool(num_pages))
    for name in "ab":
        found = request(name, [1] * 5, max_tokens=30)
        found.in_slot = True
        scheduler.add(found)
    for segment in scheduler.plan().segments:
        scheduler.complete(segment, SegmentResult(added=(4,), active=0, depths=(1,) * 4))
    return scheduler


def test_a_batch_is_shorter_before_anyone_gives_way() -> None:
    plan = two_that_decode(20).plan(16, 1)  # 8 more pages each
    assert plan.ahead == 16 and len(plan.decoding) == 2
    plan = two_that_decode(18).plan(16, 1)
    assert plan.ahead == 8 and len(plan.decoding) == 2 and not plan.preempted
    plan = two_that_decode(18).plan(16, 12)
    assert plan.ahead == 14 and not plan.preempted
    plan = two_that_decode(18).plan(16, 16)
    assert plan.ahead == 16 and [found.id for found in plan.preempted] == ["b"]


@pytest.mark.parametrize("seed", range(60))
def test_admission_leaves_what_each_running_request_may_still_take(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, seen = Scheduler._claim, list[int]()

    def claimed(scheduler: Scheduler, found: Request, node: Any, outstanding: int) -> bool:
        seen.append(outstanding)
        assert outstanding == sum(map(scheduler._outstanding, scheduler.running))
        return claim(scheduler, found, node, outstanding)

    monkeypatch.setattr(Scheduler, "_claim", claimed)
    finish(driven(seed, has_prefixes=seed % 2 == 1))
    assert seen
