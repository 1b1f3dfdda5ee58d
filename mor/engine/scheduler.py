"""Who takes part in the next visit, with which pages.

Integers only and deterministic: the same calls give the same plans. First come, first served: requests run in order of
arrival, and where pages lack the youngest running one gives way, so the oldest always goes on and every request ends.

A request decodes visit by visit, each planned here, or by itself in a *slot* of the device (`Request.in_slot`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mor.engine.block_pool import BlockPool
from mor.engine.cache_shape import CacheShape
from mor.engine.limits import Limits
from mor.engine.prefix_cache import PageCopy, PrefixCache, PrefixNode
from mor.engine.request import FinishReason, Lacks, Request, Segment, SegmentResult
from mor.engine.slot_pages import SlotPages

NewPages = tuple[Request, int, int, list[int]]
"""Pages that a request got: (request, virtual sequence, number of the first one in it, pages)."""


class QueueFull(RuntimeError):
    """As many requests wait as may; try again later."""


@dataclass(kw_only=True)
class Plan:
    """The next visit: make `copies`, then visit all `segments` (in order of arrival).

    No page is both source and target, so the order of the copies does not matter. `preempted`: requests whose segment
    in flight, if any, is dropped; they will start again from their first token. `num_tokens`: that take the visit.
    `decoding`: requests that are in a slot or may enter one, with pages for `ahead` visits; `grown`: what
    running requests got to go on.
    """

    segments: list[Segment] = field(default_factory=list[Segment])
    decoding: list[Request] = field(default_factory=list[Request])
    grown: list[NewPages] = field(default_factory=list[NewPages])
    preempted: list[Request] = field(default_factory=list[Request])
    copies: list[PageCopy] = field(default_factory=list[PageCopy])
    num_tokens: int = 0
    ahead: int = 0


class Scheduler:
    """Plans visits: `plan`, run it, `complete` each of its segments, `append` or `finish` where a token was sampled."""

    def __init__(
        self, *, shape: CacheShape, limits: Limits, pool: BlockPool, prefix_cache: PrefixCache | None = None
    ) -> None:
        self.shape, self.limits = shape, limits
        self._pool, self._prefix_cache = pool, prefix_cache
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._live: dict[str, Request] = {}
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Sequence[Request]:
        """In order of arrival."""
        return tuple(self._running)

    @property
    def waiting(self) -> Sequence[Request]:
        """In order of arrival."""
        return tuple(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises ValueError naming the limit it exceeds, QueueFull for `max_waiting`."""
        request.most_output = min(request.params.max_tokens, self.limits.max_length - len(request.prompt))
        request.most_computed = len(request.prompt) + request.most_output - request.params.generates
        self._check(request)
        if self.limits.max_waiting is not None and len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(f"request {request.id!r} refused: max_waiting={self.limits.max_waiting} requests wait")
        request.arrival = self._num_added
        self._num_added += 1
        self._clear_pages(request)
        self._live[request.id] = request
        self._waiting.append(request)

    def _check(self, request: Request) -> None:
        name, size = f"request {request.id!r}", len(request.prompt)
        if request.id in self._live:
            raise ValueError(f"{name} is already being generated; ids of live requests must differ")
        assert request.state == "waiting" and not request.output
        if not size:
            raise ValueError(f"{name} has an empty prompt; at least one token is needed")
        generates = request.params.generates
        if size > self.limits.max_length - generates:
            raise ValueError(
                f"{name} has a prompt of {size} tokens; max_length={self.limits.max_length} leaves room for at most "
                f"{self.limits.max_length - generates}{' and one of output' * generates}"
            )
        needed = self.shape.worst_pages(request.most_computed)
        if needed > self._pool.num_pages:
            fit = self.shape.most_tokens(self._pool.num_pages) + 1 - size
            advice = f"lower max_tokens to {fit}" if fit > 0 else "shorten the prompt"
            raise ValueError(
                f"{name} may need {needed} pages for {size} tokens of prompt and {request.most_output} of "
                f"output, and num_pages={self._pool.num_pages}; {advice}, or give the pool more memory"
            )

    def abort(self, request_id: str) -> bool:
        """End a request now, wherever it is; its pages are free at once. False if none of this id is live."""
        request = self._live.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request is not None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a live request. What it computed serves others, unless it was aborted or failed."""
        assert request.state != "finished", f"request {request.id!r} is finished already"
        del self._live[request.id]
        if request.state == "waiting":
            self._waiting.remove(request)
        else:
            del self._running[bisect_left(self._running, request.arrival, key=lambda other: other.arrival)]
            if self._prefix_cache is not None and reason in ("stop", "length"):
                self._prefix_cache.insert(request)
        request.state, request.finish_reason = "finished", reason
        self._release(request)

    def advance(self, request: Request, tokens: Sequence[int], depths: Sequence[int], lengths: list[int]) -> None:
        """Enter what a request did in its slot: tokens sampled, depths of as many that were computed, and the entries
        of its sequences, those of the token on its way included: a list that is the request's from here on."""
        assert request.in_slot and request.state == "running" and len(tokens) == len(depths)
        request.output += tokens
        request.depths += depths
        request.num_computed += len(depths)
        request.lengths = lengths

    def append(self, request: Request, token: int) -> None:
        """Add a sampled token to a running request; its segment may enter at the next plan."""
        assert request.state == "running" and request.segment is None and request.num_computed == request.num_known
        assert len(request.output) < request.most_output, f"request {request.id!r} should have been finished"
        request.output.append(token)

    def complete(self, segment: Segment, result: SegmentResult) -> bool:
        """Enter what a visit did to a segment. False, and nothing is done, if the segment was dropped meanwhile."""
        request = segment.request
        if request.segment is not segment:
            return False
        assert 0 <= result.active <= segment.active and len(result.added) == self.shape.num_sequences
        for sequence, added in enumerate(result.added):
            request.lengths[sequence] += added
        for sequence in self.shape.growing[segment.recursion]:
            self._give_back(request, sequence)
        segment.recursion, segment.active = segment.recursion + 1, result.active
        if not segment.active:
            self._end(segment, result)
        assert not segment.active or segment.recursion < len(self.shape.growing), "a token took too many recursions"
        return True

    def _give_back(self, request: Request, sequence: int) -> None:
        """Free the pages of a sequence beyond its entries."""
        pages, length = request.pages[sequence], request.lengths[sequence]
        used = self.shape.pages(sequence, length)
        assert used <= len(pages), f"{length} entries of sequence {sequence} exceed its {len(pages)} pages"
        self._pool.release(pages[: used - 1 if used else None : -1])
        del pages[used:]

    def _end(self, segment: Segment, result: SegmentResult) -> None:
        request = segment.request
        assert len(result.depths) == segment.count and len(result.scores) == len(segment.scoring)
        request.depths += result.depths
        request.scores += result.scores
        request.num_computed += segment.count
        request.segment = None
        if self._prefix_cache is not None and request.num_computed == request.prefill:
            self._prefix_cache.insert(request)

    def plan(self, ahead: int = 0, least: int = 0) -> Plan:
        """Decide the next visit, and take the pages it may fill.

        Segments in flight go on; then the requests that decode enter their next token, then prompts that have begun
        their next chunk, then new requests are admitted. Requests in slots get pages for `ahead` visits after the last
        one whose outcome was entered, or for fewer, but `least`, before anyone gives way for that.
        """
        plan, planned = Plan(ahead=ahead), list[Request]()
        for request in self._running:
            (plan.decoding if request.is_decoding_alone else planned).append(request)
        plan.num_tokens = sum(request.segment.active for request in planned if request.segment)
        between = [request for request in planned if request.segment is None]
        slots = SlotPages(self.shape, plan.decoding) if plan.decoding else None
        lacks = {request: self._lacks(request.segment) for request in planned if request.segment}
        if slots is not None:
            plan.ahead = self._affordable(slots, lacks, ahead, least)
            lacks |= slots.lacks(plan.ahead)
        self._go_on([(request, lacks[request]) for request in self._running if lacks.get(request)], plan)
        self._enter(between, plan, prefilling=False)
        if self._enter(between, plan, prefilling=True) and not plan.preempted:
            self._admit(plan, planned, slots)
        plan.segments = [request.segment for request in self._running if request.segment]
        if plan.preempted:
            plan.decoding = [request for request in plan.decoding if request.state == "running"]
        return plan

    def _affordable(self, slots: SlotPages, others: Mapping[Request, Lacks], most: int, least: int) -> int:
        """Visits that there are pages for beside what others lack: `most` or fewer, `least` in any case."""
        needed = sum(count for lacks in others.values() for _, count in lacks)
        while most > least and not self._evict_for(needed + slots.num_lacking(most)):
            most = (most + least) // 2
        return most

    def _go_on(self, lacking: Sequence[tuple[Request, Lacks]], plan: Plan) -> None:
        """Give running requests, in order of arrival, what they lack to go on. Who finds no pages is preempted."""
        promised, staying = 0, list[tuple[Request, Lacks]]()
        for request, lacks in lacking:
            if request.state == "running":
                needed = promised + sum([count for _, count in lacks])
                if needed > self._pool.num_free and not self._make_room(needed, request, plan):
                    self._preempt(request, plan)
                else:
                    promised = needed
                    staying.append((request, lacks))
        plan.grown = self._give(staying, promised)

    def _give(self, lacking: Sequence[tuple[Request, Lacks]], num_pages: int) -> list[NewPages]:
        """Take so many pages, which are there, and give requests what they lack."""
        taken, start, grown = self._pool.take(num_pages), 0, list[NewPages]()
        for request, lacks in lacking:
            for sequence, count in lacks:
                pages, more = request.pages[sequence], taken[start : start + count]
                grown.append((request, sequence, len(pages), more))
                pages += more
                start += count
        return grown

    def _enter(self, requests: Sequence[Request], plan: Plan, *, prefilling: bool) -> bool:
        """Let requests that are ready enter their next segments, in order of arrival; False if one found no room."""
        for request in requests:
            if request.is_ready and request.is_prefilling == prefilling:
                segment = self._next_segment(request)
                if not self._has_room(segment, plan) or not self._reserve(segment, plan):
                    return False
                self._start(segment, plan)
        return True

    def _next_segment(self, request: Request, start: int | None = None) -> Segment:
        start, chunk = request.num_computed if start is None else start, self.limits.prefill_chunk
        return Segment(
            request=request, start=start, count=min(self._prefill(request), start - start % chunk + chunk) - start
        )

    def _prefill(self, request: Request) -> int:
        """Tokens to compute, on admission, before the request decodes."""
        return request.num_known - request.in_slot

    def _has_room(self, segment: Segment, plan: Plan) -> bool:
        if plan.num_tokens + segment.count <= self.limits.max_visit_tokens:
            return True
        is_chunk = segment.start < segment.request.prefill or segment.request.state == "waiting"
        return is_chunk and not any(request.segment and request.is_prefilling for request in self._running)

    def _start(self, segment: Segment, plan: Plan) -> None:
        segment.request.segment = segment
        plan.num_tokens += segment.count

    def _lacks(self, segment: Segment) -> Lacks:
        """What a visit of `segment` lacks."""
        request, lacks = segment.request, Lacks()
        for sequence in self.shape.growing[segment.recursion]:
            length = request.lengths[sequence] + segment.active
            count = self.shape.pages(sequence, length) - len(request.pages[sequence])
            if count > 0:
                lacks.append((sequence, count))
        return lacks

    def _reserve(self, segment: Segment, plan: Plan) -> bool:
        """Take the pages that a visit of `segment` may fill; False if even younger requests' do not suffice."""
        lacks = self._lacks(segment)
        needed = sum(count for _, count in lacks)
        if not self._make_room(needed, segment.request, plan):
            return False
        self._give([(segment.request, lacks)], needed)
        return True

    def _make_room(self, num_pages: int, request: Request, plan: Plan) -> bool:
        """Free pages for a running request: prefixes nobody uses, then what younger requests hold."""
        while not self._evict_for(num_pages):
            youngest = self._running[-1]
            if youngest is not request:
                self._preempt(youngest, plan)
                continue
            if len(self._running) > 1:
                return False
            self._clear_prefixes()
            assert num_pages <= self._pool.num_free, "a request that fits the pool alone lacks pages"
        return True

    def _evict_for(self, num_pages: int) -> bool:
        if self._prefix_cache is not None and self._pool.num_free < num_pages:
            self._prefix_cache.evict(num_pages - self._pool.num_free)
        return num_pages <= self._pool.num_free

    def _clear_prefixes(self) -> None:
        if self._prefix_cache is not None:
            self._prefix_cache.clear()

    def _preempt(self, request: Request, plan: Plan) -> None:
        """Give up the youngest running request's work; its output stays and becomes part of its next prefill."""
        assert request is self._running[-1]
        self._running.pop()
        if request.segment is not None:
            plan.num_tokens -= request.segment.active
        self._release(request)
        request.num_computed, request.depths = 0, []
        request.state = "waiting"
        request.num_preemptions += 1
        self._waiting.appendleft(request)
        plan.preempted.append(request)

    def _release(self, request: Request) -> None:
        if self._prefix_cache is not None:
            self._prefix_cache.release(request)
        for pages in request.pages:
            self._pool.release(pages)
        self._clear_pages(request)
        request.segment = None

    def _clear_pages(self, request: Request) -> None:
        request.pages = [[] for _ in range(self.shape.num_sequences)]
        request.lengths = [0] * self.shape.num_sequences

    def _admit(self, plan: Plan, planned: Sequence[Request], slots: SlotPages | None) -> None:
        """Admit waiting requests in order of arrival, while there are slots, tokens and pages. Who runs already:
        `planned`, and in `slots`."""
        if not self._waiting or len(self._running) >= self.limits.max_requests:
            return
        outstanding = sum(map(self._outstanding, planned))
        outstanding += slots.outstanding(self.limits.room_to_grow) if slots else 0
        while self._waiting and len(self._running) < self.limits.max_requests:
            request = self._waiting[0]
            node = self._find_prefix(request)
            start = node.num_tokens if node else 0
            if not self._has_room(self._next_segment(request, start), plan):
                return
            if not self._claim(request, node, outstanding):
                if self._running:
                    return
                self._clear_prefixes()
                node = None
            self._begin(request, node, plan)
            outstanding += self._outstanding(request)

    def _find_prefix(self, request: Request) -> PrefixNode | None:
        if self._prefix_cache is None or request.is_scoring:
            return None
        return self._prefix_cache.lookup(request.tokens, request.params.budget)

    def _claim(self, request: Request, node: PrefixNode | None, outstanding: int) -> bool:
        """Whether all tokens known of `request` fit, at worst, beside what the running ones may still take. On success
        `node` is held."""
        lengths, computed = (node.lengths, node.num_tokens) if node else (None, 0)
        needed = self.shape.worst_pages(request.num_known, lengths, computed)
        if node is not None and self._prefix_cache is not None:
            self._prefix_cache.hold(request, node)
            needed -= sum(length // size for length, size in zip(node.lengths, self.shape.tokens_per_page, strict=True))
        if self._evict_for(needed + outstanding):
            return True
        if self._prefix_cache is not None:
            self._prefix_cache.release(request)
        return False

    def _outstanding(self, request: Request) -> int:
        """Pages that a running request may still take for the tokens known of it and those it has room to grow by."""
        known = max(request.num_known, min(request.most_computed, request.num_known + self.limits.room_to_grow))
        worst = self.shape.worst_pages(known, request.lengths, request.num_computed)
        return max(0, worst - request.num_pages)  # a slot's pages may reach ahead of what is known

    def _begin(self, request: Request, node: PrefixNode | None, plan: Plan) -> None:
        """Admit the first waiting request, whose pages are there, and let its first segment enter, if it has one."""
        if node is not None and self._prefix_cache is not None:
            plan.copies += self._prefix_cache.adopt(request, node)
        if not request.num_preemptions:
            request.cached_tokens = request.num_computed
        request.state, request.prefill = "running", self._prefill(request)
        self._running.append(self._waiting.popleft())
        if request.is_prefilling:
            segment = self._next_segment(request)
            reserved = self._reserve(segment, plan)
            assert reserved and not plan.preempted
            self._start(segment, plan)
