"""A runner without a model: depths and next tokens are functions of the token prefix and its budget.

It writes what a model would write, a code of the prefix, into pages, and checks at every visit that all entries a model
would read are there.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mor.engine.block_pool import BlockPool
from mor.engine.cache_shape import CacheShape
from mor.engine.limits import Limits
from mor.engine.params import Budget, SamplingParams
from mor.engine.prefix_cache import PrefixCache
from mor.engine.request import Request, Segment, SegmentResult, TokenScore
from mor.engine.scheduler import Plan, Scheduler

VOCABULARY = 7
STOP_TOKEN = 0


def prefix_codes(tokens: Sequence[int], budget: Budget) -> list[int]:
    """A number for each prefix of the tokens."""
    return _prefix_codes(tuple(tokens), budget)


@lru_cache(maxsize=10_000)
def _prefix_codes(tokens: tuple[int, ...], budget: Budget) -> list[int]:
    codes, code = list[int](), zlib.crc32(repr(budget).encode())
    for token in tokens:
        code = zlib.crc32(f"{token},".encode(), code)
        codes.append(code)
    return codes


@dataclass(frozen=True, kw_only=True)
class SimulatedModel:
    """Depths between `least` and the recursions (or the request's `max_recursions`), and the token after a prefix."""

    shape: CacheShape
    least: int = 0

    def depth(self, code: int, budget: Budget) -> int:
        most = min(self.shape.num_recursions, budget[1] or self.shape.num_recursions)
        if self.shape.one_visit:
            return most
        return self.least + (code >> 3) % (most + 1 - self.least)

    def depths(self, tokens: Sequence[int], budget: Budget) -> list[int]:
        return [self.depth(code, budget) for code in prefix_codes(tokens, budget)]

    def next_token(self, tokens: Sequence[int], budget: Budget) -> int:
        return (prefix_codes(tokens, budget)[-1] >> 11) % VOCABULARY

    def entries(self, sequence: int, tokens: Sequence[int], budget: Budget) -> list[int]:
        """What a sequence holds of these tokens."""
        if not self.shape.written[sequence]:
            return []
        codes = prefix_codes(tokens, budget)
        holds_all = self.shape.holds_all[sequence]
        return [code for code in codes if holds_all or self.depth(code, budget) > sequence]

    def scores(self, request: Request) -> list[TokenScore]:
        """Of a prompt's tokens after the first, if asked for."""
        if request.params.prompt_logprobs is None:
            return []
        codes, budget = prefix_codes(request.prompt, request.params.budget), request.params.budget
        return [TokenScore(-float(code), (), self.depth(code, budget)) for code in codes[:-1]]

    def solo_output(self, request: Request, limits: Limits) -> tuple[list[int], str]:
        """The output and its reason to end, if nothing else existed."""
        tokens, most = list(request.prompt), min(request.params.max_tokens, limits.max_length - len(request.prompt))
        for _ in range(most):
            tokens.append(self.next_token(tokens, request.params.budget))
            if tokens[-1] == STOP_TOKEN and not request.params.ignore_eos:
                return tokens[len(request.prompt) :], "stop"
        return tokens[len(request.prompt) :], "length"


@dataclass
class SimulatedRunner:
    """The pages' contents."""

    model: SimulatedModel
    pages: dict[int, list[int]] = field(default_factory=dict)

    def copy(self, plan: Plan) -> None:
        sources, targets = {c.source for c in plan.copies}, [c.target for c in plan.copies]
        assert not sources & set(targets) and len(targets) == len(set(targets)), "copies depend on their order"
        for copy in plan.copies:
            self.pages[copy.target] = list(self.pages[copy.source])

    def read(self, sequence: int, pages: Sequence[int], length: int) -> list[int]:
        size = self.model.shape.tokens_per_page[sequence]
        return [self.pages[pages[i // size]][i % size] for i in range(length)]

    def visit(self, plan: Plan) -> list[SegmentResult]:
        """Do what is planned. No page is written by two requests."""
        self.copy(plan)
        writers: dict[int, Request] = {}
        return [self._visit(segment, writers) for segment in plan.segments]

    def _visit(self, segment: Segment, writers: dict[int, Request]) -> SegmentResult:
        shape, request = self.model.shape, segment.request
        budget, stop = request.params.budget, segment.start + segment.count
        assert segment.tokens == tuple(request.tokens[segment.start : stop])
        depths = self.model.depths(request.tokens[:stop], budget)[segment.start :]
        taken = shape.num_recursions if shape.one_visit else segment.recursion + 1
        assert segment.active == (sum(depth >= taken for depth in depths) if segment.entered else segment.count)
        added = [0] * shape.num_sequences
        for sequence in shape.growing[segment.recursion]:
            entries = self.model.entries(sequence, request.tokens[:stop], budget)
            have = request.lengths[sequence]
            self._write(sequence, request, entries, writers)
            added[sequence] = len(entries) - have
            assert self.read(sequence, request.pages[sequence], len(entries)) == entries
        active = 0 if shape.one_visit else sum(depth > taken for depth in depths)
        if active:
            return SegmentResult(added=tuple(added), active=active)
        scores = self.model.scores(request)
        told = tuple(scores[number] for number in segment.scoring)
        return SegmentResult(added=tuple(added), active=0, depths=tuple(depths), scores=told)

    def _write(self, sequence: int, request: Request, entries: Sequence[int], writers: dict[int, Request]) -> None:
        size = self.model.shape.tokens_per_page[sequence]
        for place in range(request.lengths[sequence], len(entries)):
            page = request.pages[sequence][place // size]
            assert writers.setdefault(page, request) is request, "two requests write one page"
            self.pages.setdefault(page, [-1] * size)
            self.pages[page] += [-1] * (size - len(self.pages[page]))
            self.pages[page][place % size] = entries[place]


@dataclass(kw_only=True)
class Simulation:
    """A scheduler, a pool and a simulated runner, driven as an engine would."""

    model: SimulatedModel
    limits: Limits
    num_pages: int
    granularity: int | None = 4

    def __post_init__(self) -> None:
        shape = self.model.shape
        self.pool = BlockPool(self.num_pages)
        self.cache = None if self.granularity is None else PrefixCache(self.pool, shape, granularity=self.granularity)
        self.scheduler = Scheduler(shape=shape, limits=self.limits, pool=self.pool, prefix_cache=self.cache)
        self.runner = SimulatedRunner(self.model)
        self.visits: list[list[tuple[str, int, int, int]]] = []
        self.admissions: list[str] = []
        self.live: list[Request] = []
        self.finished_at: dict[str, int] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.live.append(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self._harvest()

    def step(self) -> Plan:
        running = {r.id for r in self.scheduler.running}
        oldest = min(self.live, key=lambda r: r.arrival, default=None)
        plan = self.scheduler.plan()
        assert oldest is None or oldest not in plan.preempted or oldest.id not in running, "the oldest was preempted"
        self.admissions += [r.id for r in self.scheduler.running if r.id not in running and not r.num_preemptions]
        self.visits.append([(s.request.id, s.start, s.count, s.recursion) for s in plan.segments])
        self._check_plan(plan)
        results = self.runner.visit(plan)
        for segment, result in zip(plan.segments, results, strict=True):
            assert self.scheduler.complete(segment, result)
            if not segment.active and segment.needs_head:
                self._sample(segment.request)
            elif not segment.request.params.generates and segment.request.num_computed == len(segment.request.prompt):
                self.scheduler.finish(segment.request, "length")
        self._harvest()
        return plan

    def _sample(self, request: Request) -> None:
        token = self.model.next_token(request.tokens, request.params.budget)
        self.scheduler.append(request, token)
        if token == STOP_TOKEN and not request.params.ignore_eos:
            self.scheduler.finish(request, "stop")
        elif len(request.output) == request.most_output:
            self.scheduler.finish(request, "length")

    def _harvest(self) -> None:
        for request in self.live:
            if request.state == "finished":
                self.finished_at[request.id] = len(self.visits)
        self.live = [request for request in self.live if request.state != "finished"]

    def _check_plan(self, plan: Plan) -> None:
        tokens = sum(segment.active for segment in plan.segments)
        most = max(self.limits.max_visit_tokens, self.limits.max_requests - 1 + self.limits.prefill_chunk)
        assert tokens == plan.num_tokens <= most
        chunks = [s for s in plan.segments if s.start < s.request.prefill]
        assert tokens <= self.limits.max_visit_tokens or len(chunks) == 1
        assert len({segment.request.id for segment in plan.segments}) == len(plan.segments)
        assert {s.request.id for s in plan.segments} == {r.id for r in self.scheduler.running if r.segment}
        assert self.scheduler.num_running <= self.limits.max_requests
        for segment in plan.segments:
            first, last = segment.start, segment.start + segment.count - 1
            assert first // self.limits.prefill_chunk == last // self.limits.prefill_chunk

    def check(self) -> None:
        """What must hold between visits."""
        self._check_order()
        self._check_references()
        self._check_writable()
        for request in self.live:
            self._check_request(request)
        self._check_nodes()

    def _check_order(self) -> None:
        arrivals = [request.arrival for request in (*self.scheduler.running, *self.scheduler.waiting)]
        assert arrivals == sorted(set(arrivals)) and len(arrivals) == len(self.live)

    def _check_references(self) -> None:
        counts = Counter(page for request in self.live for pages in request.pages for page in pages)
        if self.cache is not None:
            counts.update(page for node in self.cache.nodes() for pages in node.pages for page in pages)
        assert [self.pool.references(page) for page in range(self.num_pages)] == [
            counts[page] for page in range(self.num_pages)
        ]
        assert self.pool.num_free == self.num_pages - len(counts)

    def _check_writable(self) -> None:
        """A page that a request may write to is in no other request's lists."""
        holders = Counter(page for request in self.live for pages in request.pages for page in pages)
        for request in self.live:
            for length, size, pages in zip(request.lengths, self.model.shape.tokens_per_page, request.pages):
                assert all(holders[page] == 1 for page in pages[length // size :])

    def _check_request(self, request: Request) -> None:
        shape, budget = self.model.shape, request.params.budget
        if request.state == "waiting":
            assert not request.num_pages and not request.num_computed and request.segment is None
        assert request.depths == self.model.depths(request.tokens, budget)[: request.num_computed]
        assert request.scores == self.model.scores(request)[: len(request.scores)]
        assert request.params.prompt_logprobs is None or len(request.scores) >= min(
            request.num_computed, len(request.prompt) - 1
        )
        for sequence, (length, pages) in enumerate(zip(request.lengths, request.pages, strict=True)):
            assert len(pages) == shape.pages(sequence, length), "a request keeps pages it does not use"
            stop = request.num_computed if request.segment is None else request.num_known
            entries = self.model.entries(sequence, request.tokens[:stop], budget)
            assert self.runner.read(sequence, pages, length) == entries[:length]
            if request.segment is None:
                assert length == len(entries) == shape.lengths(request.depths)[sequence]

    def _check_nodes(self) -> None:
        """What the prefix cache remembers is what computing it anew would give, and nobody has written over it."""
        if self.cache is None:
            return
        for budget, root in self.cache._roots.items():
            ahead = list(root.children.values())
            while ahead:
                node = ahead.pop()
                ahead += node.children.values()
                tokens = [token for part in node.path() for token in part.tokens]
                depths = self.model.depths(tokens, budget)
                assert list(node.lengths) == self.model.shape.lengths(depths) and node.num_tokens == len(tokens)
                for sequence, pages in enumerate(self.cache._pages(node.path())):
                    assert len(pages) == self.model.shape.pages(sequence, node.lengths[sequence])
                    entries = self.model.entries(sequence, tokens, budget)
                    assert self.runner.read(sequence, pages, node.lengths[sequence]) == entries

    def run(self, most_visits: int = 100_000) -> None:
        """Step until nothing is live."""
        while self.live:
            assert len(self.visits) < most_visits, "the requests do not end"
            plan = self.step()
            assert plan.segments or plan.preempted, "nothing goes on"


def small_shape(num_recursions: int = 3, *, outer: bool = True, size: int = 4) -> CacheShape:
    """Recursion-wise keys and values, and unshared layers."""
    count = num_recursions + outer
    return CacheShape(
        num_recursions=num_recursions,
        tokens_per_page=(size,) * count,
        holds_all=(False,) * num_recursions + (True,) * outer,
        written=(True,) * count,
    )


def request(name: str, prompt: Sequence[int], **params: int | float | bool | None) -> Request:
    return Request(id=name, prompt=tuple(prompt), params=SamplingParams(**params))  # type: ignore[arg-type]
