"""Requests in slots, batches of visits, and what comes back: the host's side of `mor.engine.slot_program`.

A batch is a few visits that are queued without waiting for the one before: its outcome is read when the next one is
already queued, so the device never waits for the host. On CUDA a visit is a graph.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.engine.graphs import Graphs
from mor.engine.request import Request
from mor.engine.scheduler import NewPages
from mor.engine.slot_program import SlotProgram, VisitShape
from mor.engine.slot_state import BROKEN, NOTHING, Edits, Report, SlotRow
from mor.engine.visit_choice import PATIENCE
from mor.engine.visit_pace import VisitPace

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Numbers of slots that there are visits for."""

USUAL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers that visits are captured for before anyone comes. Those between them are served by the next larger one until
they are captured too: on an H200 a layer of 16 rows takes 1.1 times as long as one of 4, and a visit of MoR-3 with 256
slots 1.45 times as long as one with 32."""

SHORTEST = 512
"""The least bound on a visit's entries; each further one is four times as large. Visits of a new shape are captured
when it is first needed, which takes a moment: few bounds, few moments."""

RowOf = Callable[[Request, int], SlotRow]

SHORTENED = 4
"""A batch may be so many times shorter before a request gives its pages to others."""

BATCH_SECONDS = 0.02
"""Where the host waits for each batch, none begins another visit after this: who streams should not see its batches."""


class Progress(NamedTuple):
    """What a batch did for one request: its new tokens with the depths of the positions that predicted them and, if it
    asks for them, their log-probabilities, and the entries of its sequences after it. `is_broken`: there was no token
    to sample after these."""

    request: Request
    tokens: list[int]
    depths: list[int]
    logprobs: list[float]
    lengths: list[int]
    is_broken: bool


@dataclass(kw_only=True, eq=False, slots=True)
class _Tenant:
    """A request in a slot. `made`: tokens of it that were collected since it came. `epoch`: how often it had been
    preempted by then; after one more the slot is another's. `ends_itself`: the device knows that it has ended."""

    request: Request
    row: SlotRow
    stops: frozenset[int]
    epoch: int
    made: int = 0
    ends_itself: bool = False

    @property
    def is_here(self) -> bool:
        return self.request.state == "running" and self.request.num_preemptions == self.epoch


@dataclass(kw_only=True)
class _Batch:
    """Visits in flight: who took part, and where their outcome arrives. `follows`: whether they were queued behind
    others, so that the device began them when it had ended those."""

    tenants: list[_Tenant]
    visits: int
    reports: Tensor
    lengths: Tensor
    arrived: torch.cuda.Event | None = None
    follows: bool = False


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a batch reported, slot by slot: slot s has `tokens[first[s] : first[s + 1]]` and so on."""

    first: list[int]
    tokens: list[int]
    depths: list[int]
    logprobs: np.ndarray
    lengths: list[list[int]]

    @classmethod
    def of(cls, batch: _Batch) -> _Said:
        slots = batch.reports.shape[-1]
        reports_CSK = np.ascontiguousarray(batch.reports[: batch.visits].numpy().transpose(1, 2, 0))
        reports_CX = reports_CSK.reshape(len(Report), slots * batch.visits)
        place = np.flatnonzero(reports_CX[Report.TOKEN] != NOTHING)
        tokens, depths, logprobs = reports_CX.take(place, 1)
        first = np.searchsorted(place, np.arange(slots + 1) * batch.visits)
        return cls(
            first=first.tolist(),
            tokens=tokens.tolist(),
            depths=depths.tolist(),
            logprobs=logprobs.view(np.float32),
            lengths=batch.lengths.tolist(),
        )


@dataclass(kw_only=True)
class _TurnRate:
    """How large a share of the slots turns in a visit, from the tokens of late and the visits they took."""

    tokens: float = 1.0
    visits: float = 2.0

    def see(self, depths: list[int]) -> None:
        """Count finished tokens."""
        self.tokens += len(depths)
        self.visits += sum(depths) + depths.count(0)
        if self.tokens > 4096:
            self.tokens, self.visits = self.tokens / 2, self.visits / 2

    def places(self, slots: int) -> int:
        """Places for slots to turn in: in a few steps between none and all, finer where many would idle, and seldom too
        few."""
        share = self.tokens / self.visits
        expected = slots * share + 2 * (slots * share * (1 - share)) ** 0.5
        step = max(1, slots // (8 if slots < 256 else 16))
        return min(slots, -(-int(expected + 1) // step) * step)


class SlotRunner:
    """Slots and the requests in them. `run` queues a batch, `collect` gives the outcome of the oldest one."""

    def __init__(
        self,
        program: SlotProgram,
        *,
        max_length: int,
        pace: VisitPace,
        turns_once: bool,
        period: int = 1,
        most_per_token: int = 1,
        mean_per_token: float = 2.0,
    ) -> None:
        """`pace`: of batches. `turns_once`: slots turn all at a time. `period`: in every so manieth visit.
        `most_per_token`: visits that a token may take; `mean_per_token`: that it is expected to take."""
        self._pace, self._collected, self._spared = pace, 0.0, 0.0
        self._period, self._phase, self._most_per_token = period, 0, most_per_token
        self._program, self._state = program, program.state
        self._max_length, self._turns_once = max_length, turns_once
        self._free = list(range(self._state.num_slots))
        self._tenants: dict[str, _Tenant] = {}
        self._flight: deque[_Batch] = deque()
        self._emptied: list[int] = []
        self._rate = _TurnRate(visits=mean_per_token)
        self._graphs = Graphs(program)
        self.has_strays, self._is_adrift = False, False
        self.runs_ahead, self.last_rows = program.runs_ahead, 0

    @property
    def in_flight(self) -> int:
        """Batches whose outcome was not collected."""
        return len(self._flight)

    @property
    def is_busy(self) -> bool:
        """Whether the device is at the oldest batch still and has another behind it: the host has time to spare."""
        if len(self._flight) < 2:
            return False
        arrived = self._flight[0].arrived
        return arrived is not None and not arrived.query()

    @property
    def ahead(self) -> int:
        """Visits that the next batch may take a request past what is known of it."""
        return self._pace.visits + self._visits_in_flight

    @property
    def least_ahead(self) -> int:
        """The same of a batch as short as one may be for want of pages."""
        return max(1, self._pace.visits // SHORTENED) + self._visits_in_flight

    @property
    def _visits_in_flight(self) -> int:
        return sum([batch.visits for batch in self._flight])

    def run(self, decoding: Sequence[Request], grown: Sequence[NewPages], row_of: RowOf, ahead: int) -> int:
        """Let requests take free slots and queue a batch of visits; returns how many visits. `grown`: what was added to
        the pages of those in slots. `row_of`: the row of a request that comes to a slot. `ahead`: as far as their pages
        reach, at most `self.ahead`.

        Afterwards `last_rows` counts the rows that took the batch's visits (all that might have, where only the device
        knows), and `has_strays` tells whether a batch in flight may still write to pages of requests that are gone.
        """
        edits = self._changes(decoding, grown, row_of)
        if not self._tenants:
            self._emptied += edits.emptied
            self._phase = 0
            return 0
        shape, most = self._shape(num_new=len(edits.rows)), min(ahead - self._visits_in_flight, self._most_useful())
        self._state.edit(edits)
        if most <= 0:
            return 0
        self._state.begin_batch()
        visits = self._visit(shape, most)
        reports, lengths, arrived = self._sent(visits)
        batch = _Batch(
            tenants=list(self._tenants.values()),
            visits=visits,
            reports=reports,
            lengths=lengths,
            arrived=arrived,
            follows=bool(self._flight),
        )
        self._flight.append(batch)
        return visits

    def _visit(self, shape: VisitShape, most: int) -> int:
        """Make up to `most` visits, all of them where the host does not wait; returns how many."""
        visits, ends, before = 0, False, self._program.rows
        latest = math.inf if self.runs_ahead else time.perf_counter() + BATCH_SECONDS
        while visits < most and not ends:
            ends = self._graphs.visit(shape if self._phase == 0 else replace(shape, turns=0))
            ends = ends or time.perf_counter() > latest
            self._phase = (self._phase + 1) % self._period
            visits += 1
        after = self._program.rows
        self.last_rows = visits * len(self._tenants) if before is None or after is None else after - before
        return visits

    def _most_useful(self) -> int:
        """Visits after those in flight until the last of the requests must have ended."""
        # The first visit of a new one has nothing to sample.
        most = max([tenant.row.left - tenant.made + (tenant.made == 0) for tenant in self._tenants.values()])
        return most * self._most_per_token - self._visits_in_flight

    def collect(self) -> Iterator[Progress]:
        """Wait for the oldest batch, and tell what it did. Requests that have gone since it was queued are left out."""
        batch = self._flight.popleft()
        self._wait_for(batch)
        said = _Said.of(batch)
        self._rate.see(said.depths)
        return self._progress(batch, said)

    def _progress(self, batch: _Batch, said: _Said) -> Iterator[Progress]:
        for tenant in batch.tenants:
            if not tenant.is_here:
                continue
            request, slot = tenant.request, tenant.row.slot
            start, end = said.first[slot], said.first[slot + 1]
            is_broken = start < end and said.tokens[end - 1] == BROKEN
            end -= is_broken
            tokens, depths = said.tokens[start:end], said.depths[start:end]
            logprobs = said.logprobs[start:end].tolist() if request.params.logprobs is not None else []
            tenant.made += end - start
            tenant.ends_itself = is_broken or tenant.made >= tenant.row.left or not tenant.stops.isdisjoint(tokens)
            yield Progress(request, tokens, depths, logprobs, said.lengths[slot], is_broken)

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """What is done here could wait: it says nothing of how much work the host has."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spared += time.perf_counter() - start

    def _wait_for(self, batch: _Batch) -> None:
        if batch.arrived is None:
            return
        with self.sparing():
            batch.arrived.synchronize()
        now, waited = time.perf_counter(), self._spared
        if batch.follows:
            self._pace.saw(batch.visits, worked=now - self._collected - waited, waited=waited)
        self._collected, self._spared = now, 0.0

    def forget(self) -> None:
        """Empty all slots: after work that broke off, nobody knows how far each came or what the device still does."""
        self._flight.clear()
        self._tenants = {}
        self._free = list(range(self._state.num_slots))
        self._emptied, self._is_adrift = list(self._free), True

    def _changes(self, decoding: Sequence[Request], grown: Sequence[NewPages], row_of: RowOf) -> Edits:
        """Empty the slots of requests that are gone, fill free ones, and tell all about their new pages."""
        gone = [tenant for tenant in self._tenants.values() if not tenant.is_here]
        self.has_strays = self._is_adrift or (bool(self._flight) and any(not tenant.ends_itself for tenant in gone))
        self._is_adrift = False
        for tenant in gone:
            del self._tenants[tenant.request.id]
            self._release(tenant)
        edits = Edits(emptied=self._emptied)
        self._emptied = []
        for request, sequence, number, pages in grown:
            tenant = self._tenants.get(request.id)
            if tenant is not None:
                edits.pages.append((tenant.row.slot, sequence, number, pages))
        for request in [request for request in decoding if request.id not in self._tenants]:
            row = self._settle(request, row_of)
            edits.rows.append(row)
            edits.pages += [(row.slot, sequence, 0, pages) for sequence, pages in enumerate(request.pages)]
        return edits

    def _settle(self, request: Request, row_of: RowOf) -> SlotRow:
        row, epoch = row_of(request, heapq.heappop(self._free)), request.num_preemptions
        self._tenants[request.id] = _Tenant(request=request, row=row, stops=frozenset(row.stops), epoch=epoch)
        return row

    def _release(self, tenant: _Tenant) -> None:
        self._emptied.append(tenant.row.slot)
        heapq.heappush(self._free, tenant.row.slot)

    def _shape(self, *, num_new: int) -> VisitShape:
        """The smallest visit for all that are in slots."""
        tenants = self._tenants.values()
        needed = 1 + max([tenant.row.slot for tenant in tenants])
        slots = min(SIZES[bisect_left(SIZES, needed)] if needed <= SIZES[-1] else needed, self._state.num_slots)
        places = self._rate.places(slots)
        many_are_new = num_new > max(1, slots // 8)
        longest = self.ahead + 1 + max([tenant.row.number + tenant.made for tenant in tenants])
        turns = slots if self._turns_once or many_are_new else places
        limited = any(tenant.row.is_limited for tenant in tenants)
        return VisitShape(slots=slots, turns=turns, longest=self._bound(longest), limited=limited)

    def _bound(self, longest: int) -> int:
        """The bound on entries that a visit of sequences this long has."""
        bound = SHORTEST
        while bound < longest:
            bound *= 4
        return min(bound, self._max_length)

    def warm_up(
        self,
        sizes: Sequence[int] | None = None,
        lengths: Sequence[int] = (1,),
        limits: Sequence[bool] = (False, True),
    ) -> None:
        """Capture the visits that these numbers of slots (None: all there may be) need for sequences up to these
        lengths, with top-k and top-p or without, so that none of them is captured while requests wait."""
        most = self._state.num_slots
        for slots in sorted({min(size, most) for size in sizes or SIZES}):
            turns = {slots} if self._turns_once else {slots, self._rate.places(slots)}
            turns |= {0} if self._period > 1 else set()
            kinds = product(sorted(turns), {self._bound(length) for length in lengths}, limits)
            self._graphs.prepare([VisitShape(slots=slots, turns=t, longest=b, limited=is_so) for t, b, is_so in kinds])
        self._graphs.choice.patience = PATIENCE

    def warm_up_usual(self) -> None:
        """Capture what serves every request, and what serves most of them best.

        For each of the `USUAL` numbers of slots these are a visit in which all may turn, of sequences of any length and
        with limits on the draw, and one in which as many turn as is expected, of short sequences and without limits.
        `warm_up_one` captures what is wanted besides.
        """
        most = self._state.num_slots
        for slots in sorted({min(size, most) for size in USUAL}):
            expected = slots if self._turns_once else self._rate.places(slots)
            for most_turns, turns in [(slots, expected), *([(0, 0)] if self._period > 1 else [])]:
                large = VisitShape(slots=slots, turns=most_turns, longest=self._max_length, limited=True)
                self._graphs.prepare([large, VisitShape(slots=slots, turns=turns, longest=self._bound(1))])
        self._graphs.choice.patience = PATIENCE

    def warm_up_one(self) -> bool:
        """Capture what was wanted most and was not there. For when no request runs; False if there is nothing."""
        return self._graphs.prepare_missing()

    def _sent(self, visits: int) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Reports and lengths on their way to the host."""
        if self._state.device.type != "cuda":
            return self._state.reports.clone(), self._state.lengths.clone(), None
        sent = []
        for tensor in (self._state.reports[:visits], self._state.lengths):
            sent.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
            sent[-1].copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return sent[0], sent[1], arrived
