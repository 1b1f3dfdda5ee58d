"""Serving a workload with the engine, and what is seen meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mor.benchmark.arms import Arm, vanilla_twin
from mor.benchmark.workload import Workload
from mor.engine.engine import Engine
from mor.engine.kv_store import PageLayout
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Served:
    """What was seen while a workload was served.

    `seconds` on the clock, `cpu_seconds` of all this process's threads. `steady_tokens_per_second`: from when as many
    requests have ended as may run at a time until nobody waits; None if that is no time. `rows`: tokens that took a
    visit, summed over visits. `pages`: in use, mean over steps, and at most. `first_token` (since arrival) and `gaps`
    (between the tokens of a request) in seconds.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    requests: int
    steady_tokens_per_second: float | None = None
    mean_depth: float | None = None
    visits: int = 0
    rows: int = 0
    preemptions: int = 0
    most_running: int = 0
    pages: float = 0.0
    most_pages: int = 0
    page_bytes: int = 0
    first_token: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def best_rate(self) -> float:
        """Tokens per second while the queue was full, or of the whole run where that was no time."""
        return self.steady_tokens_per_second or self.tokens_per_second

    @property
    def kv_bytes(self) -> float:
        return self.pages * self.page_bytes

    @property
    def most_kv_bytes(self) -> int:
        return self.most_pages * self.page_bytes

    @property
    def rows_per_visit(self) -> float:
        return self.rows / max(1, self.visits)

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / max(self.cpu_seconds, 1e-9)


def make_engine(arm: Arm, *, concurrency: int, num_pages: int) -> Engine:
    """An engine that runs `concurrency` requests at a time. No prefix is kept: random prompts have none in common."""
    on_cpu = arm.model.device.type == "cpu"
    options = EngineOptions(
        page_entries=arm.page_entries,
        num_pages=num_pages,
        max_requests=concurrency,
        max_visit_tokens=max(512, concurrency) if on_cpu else None,
        prefix_caching=False,
        lockstep=arm.lockstep,
    )
    return Engine(arm.model, arm.tokenizer, options)


def warm_up(engine: Engine, sizes: Sequence[int], longest: int) -> None:
    """Compile and capture what a workload needs: visits of so many slots, without limits on the draw, for requests of
    up to `longest` tokens; and prompts, as a request is again that was preempted."""
    if engine.slots is not None:
        engine.slots.warm_up(sizes, [longest], [False])
    engine.warm_up_prompts()


def pages_in(num_bytes: float, arm: Arm) -> int:
    """Pages of an arm that fit `num_bytes`."""
    return int(num_bytes // PageLayout.of(arm.model.config, arm.page_entries).page_bytes(arm.model.dtype))


def pages_for(arm: Arm, num_requests: int, length: int) -> int:
    """Pages that hold `num_requests` requests of `length` tokens even if every token takes all recursions."""
    return num_requests * PageLayout.of(arm.model.config, arm.page_entries).shape.worst_pages(length)


def vanilla_bytes(arm: Arm, num_requests: int, length: int) -> int:
    """Bytes of the pool that holds exactly `num_requests` sequences of `length` tokens of the arm's vanilla twin."""
    layout = PageLayout.of(vanilla_twin(arm.model.config), arm.page_entries)
    return num_requests * layout.shape.worst_pages(length) * layout.page_bytes(arm.model.dtype)


def serve(
    engine: Engine,
    workload: Workload,
    *,
    mean_depth: float | None = None,
    temperature: float = 1.0,
    arrivals: Sequence[float] | None = None,
) -> Served:
    """Generate for all requests, which come at `arrivals` (seconds from now) or are all there at once."""
    watch = _Watch(engine=engine, arrivals=list(arrivals or [0.0] * len(workload)))
    before = engine.statistics.visits, engine.statistics.rows, engine.statistics.preemptions
    added = 0
    while added < len(workload) or engine.has_unfinished:
        while added < len(workload) and watch.arrivals[added] <= watch.now():
            params = SamplingParams(
                max_tokens=workload.lengths[added],
                temperature=temperature,
                ignore_eos=True,
                seed=added,
                mean_depth=mean_depth,
            )
            engine.add_request(str(added), workload.prompts[added], params)
            added += 1
        if engine.has_unfinished:
            watch.see(engine.step())
        elif added < len(workload):
            time.sleep(max(0.0, watch.arrivals[added] - watch.now()))
    after = engine.statistics.visits, engine.statistics.rows, engine.statistics.preemptions
    visits, rows, preemptions = (b - a for a, b in zip(before, after, strict=True))
    return watch.result(len(workload), visits=visits, rows=rows, preemptions=preemptions)


@dataclass(kw_only=True)
class _Watch:
    """What happens, step by step."""

    engine: Engine
    arrivals: list[float]
    start: float = field(default_factory=time.perf_counter)
    cpu_start: float = field(default_factory=time.process_time)
    tokens: int = 0
    depths: list[int] = field(default_factory=list[int])
    pages: list[int] = field(default_factory=list[int])
    most_running: int = 0
    last: dict[str, float] = field(default_factory=dict[str, float])
    first_token: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])
    steady: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    num_finished: int = 0

    def now(self) -> float:
        return time.perf_counter() - self.start

    def see(self, outputs: Sequence[RequestOutput]) -> None:
        now, pool = self.now(), self.engine.pool
        for output in outputs:
            self._see_tokens(output, now)
        self.pages.append(pool.num_pages - pool.num_free)
        self.most_running = max(self.most_running, self.engine.scheduler.num_running)
        self.num_finished += sum(output.finished for output in outputs)
        if self.num_finished >= self.engine.options.max_requests and self.engine.scheduler.num_waiting:
            self.steady.append((now, self.tokens))

    def _see_tokens(self, output: RequestOutput, now: float) -> None:
        if output.error is not None:
            raise RuntimeError(f"request {output.id} failed: {output.error}")
        new = len(output.token_ids)
        self.tokens += new
        self.depths += output.depths
        if new and output.id in self.last:
            self.gaps.append(now - self.last[output.id])
        elif new:
            self.first_token.append(now - self.arrivals[int(output.id)])
        self.last[output.id] = now

    def result(self, requests: int, *, visits: int, rows: int, preemptions: int) -> Served:
        steady = None
        if len(self.steady) > 1:
            (begin, before), (end, after) = self.steady[0], self.steady[-1]
            steady = (after - before) / (end - begin)
        return Served(
            seconds=self.now(),
            cpu_seconds=time.process_time() - self.cpu_start,
            tokens=self.tokens,
            requests=requests,
            steady_tokens_per_second=steady,
            mean_depth=sum(self.depths) / len(self.depths) if self.depths else None,
            visits=visits,
            rows=rows,
            preemptions=preemptions,
            most_running=self.most_running,
            pages=sum(self.pages) / max(1, len(self.pages)),
            most_pages=max(self.pages, default=0),
            page_bytes=self.engine.runner.layout.page_bytes(self.engine.model.dtype),
            first_token=tuple(self.first_token),
            gaps=tuple(self.gaps),
        )
