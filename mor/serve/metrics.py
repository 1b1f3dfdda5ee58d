"""What Prometheus reads: requests, pages, speed, latencies and depths."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from mor.serve.messages import Load, ModelFacts, News

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
RATE_WINDOW = 10.0


class TokenRate:
    """Tokens per second over the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: deque[tuple[int, int]] = deque()  # a second, and its tokens

    def add(self, tokens: int) -> None:
        second = int(self._clock())
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = second, self._counts[-1][1] + tokens
        else:
            self._counts.append((second, tokens))
            while self._counts[0][0] < second - RATE_WINDOW:
                self._counts.popleft()

    def __call__(self) -> float:
        since = self._clock() - RATE_WINDOW
        return sum(tokens for second, tokens in self._counts if second >= since) / RATE_WINDOW


class Counts(Collector):
    """A histogram: how many values are at most as large as each of `bounds`. (Prometheus's own takes one value at a
    time, and longer for it than the rest of the server for all that it does with a token.)
    """

    def __init__(self, name: str, summary: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._summary, self._bounds = name, summary, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def mean(self) -> float:
        """Of all values, NaN when there are none."""
        count = sum(self._counts)
        return self._sum / count if count else float("nan")

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As Prometheus reads it."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._summary, buckets=buckets, sum_value=self._sum)


class Metrics:
    """All of a server's numbers, in a registry of its own. An `Observer` of the engine."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.rate = TokenRate()
        self.requests = Counter("mor_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.engine_restarts = Counter("mor_engine_restarts", "Engine processes started again", registry=registry)
        self.prompt_tokens = Counter("mor_prompt_tokens", "Tokens of prompts that were served", registry=registry)
        self.cached_tokens = Counter("mor_cached_prompt_tokens", "Those found in the prefix cache", registry=registry)
        self.tokens = Counter("mor_generated_tokens", "Tokens generated", registry=registry)
        self.preemptions = Counter("mor_preemptions", "Requests that gave their pages to older ones", registry=registry)
        self.samples = Counter("mor_samples", "Samples that ended", ["reason"], registry=registry)
        self.first_token = Counts("mor_time_to_first_token_seconds", "From request to first token", SECONDS, registry)
        self.between_tokens = Counts("mor_inter_token_seconds", "Between the tokens of a sample", SECONDS, registry)
        self.running = Gauge("mor_requests_running", "Samples in the engine's visits", registry=registry)
        self.waiting = Gauge("mor_requests_waiting", "Samples that wait to run", registry=registry)
        self.pages_free = Gauge("mor_kv_pages_free", "Pages that nobody holds", registry=registry)
        self.pages_total = Gauge("mor_kv_pages_total", "Pages of the pool", registry=registry)
        self.ready = Gauge("mor_ready", "1 when the engine can answer", registry=registry)
        speed = Gauge("mor_tokens_per_second", "Tokens per second, over the last 10 s", registry=registry)
        speed.set_function(self.rate)
        mean = Gauge("mor_mean_depth", "Block applications per generated token, since the start", registry=registry)
        mean.set_function(lambda: float("nan") if self._depths is None else self._depths.mean)
        self._depths: Counts | None = None
        self._new_tokens = 0
        self._preemptions = 0

    def opened(self, facts: ModelFacts) -> None:
        """The model is known: the depths there are, and the pages."""
        self.pages_total.set(facts.num_pages)
        self.pages_free.set(facts.num_pages)
        if self._depths is None:
            depths = range(1, facts.num_recursions + 1)
            self._depths = Counts("mor_token_depth", "Block applications of generated tokens", depths, self.registry)

    def heard(self, news: News, *, since_open: float, since_last: float | None) -> None:
        """A sample's news. Seconds since its request was made, and since its last news."""
        if since_last is None and news.error is None:
            self.prompt_tokens.inc(news.prompt_tokens)
            self.cached_tokens.inc(news.cached_tokens)
        if news.depths:
            self._new_tokens += len(news.depths)
            if self._depths is not None:
                for depth in set(news.depths):
                    self._depths.add(depth, news.depths.count(depth))
            if since_last is None:
                self.first_token.add(since_open)
            else:
                self.between_tokens.add(since_last / len(news.depths), len(news.depths))
        if news.finished:
            self.samples.labels(news.finish_reason or "error").inc()

    def loaded(self, load: Load) -> None:
        """The engine's own counts, after the news they come with."""
        self.tokens.inc(self._new_tokens)
        self.rate.add(self._new_tokens)
        self._new_tokens = 0
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.pages_free.set(load.pages_free)
        self.preemptions.inc(max(0, load.preemptions - self._preemptions))
        self._preemptions = load.preemptions

    def restarted(self) -> None:
        """The engine's process was started again: it counts from 0."""
        self.engine_restarts.inc()
        self._preemptions = 0
        self.running.set(0)
        self.waiting.set(0)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)
