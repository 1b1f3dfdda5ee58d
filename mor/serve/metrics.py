"""What Prometheus reads: requests, pages, speed, latencies and depths."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
        self.first_token = Histogram(
            "mor_time_to_first_token_seconds", "From request to first token", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "mor_inter_token_seconds", "Between the tokens of a sample", buckets=SECONDS, registry=registry
        )
        self.running = Gauge("mor_requests_running", "Samples in the engine's visits", registry=registry)
        self.waiting = Gauge("mor_requests_waiting", "Samples that wait to run", registry=registry)
        self.pages_free = Gauge("mor_kv_pages_free", "Pages that nobody holds", registry=registry)
        self.pages_total = Gauge("mor_kv_pages_total", "Pages of the pool", registry=registry)
        self.ready = Gauge("mor_ready", "1 when the engine can answer", registry=registry)
        speed = Gauge("mor_tokens_per_second", "Tokens per second, over the last 10 s", registry=registry)
        speed.set_function(self.rate)
        mean = Gauge("mor_mean_depth", "Block applications per generated token, since the start", registry=registry)
        mean.set_function(lambda: self._depth_sum / self._depth_count if self._depth_count else float("nan"))
        self._depths: Histogram | None = None
        self._depth_sum, self._depth_count = 0, 0
        self._preemptions = 0

    def opened(self, facts: ModelFacts) -> None:
        """The model is known: the depths there are, and the pages."""
        self.pages_total.set(facts.num_pages)
        self.pages_free.set(facts.num_pages)
        if self._depths is None:
            self._depths = Histogram(
                "mor_token_depth",
                "Block applications of generated tokens",
                buckets=tuple(range(1, facts.num_recursions + 1)),
                registry=self.registry,
            )

    def heard(self, news: News, *, since_open: float, since_last: float | None) -> None:
        """A sample's news. Seconds since its request was made, and since its last news."""
        if news.tokens:
            self._count_tokens(news)
            if since_last is None:
                self.first_token.observe(since_open)
                self.prompt_tokens.inc(news.prompt_tokens)
                self.cached_tokens.inc(news.cached_tokens)
            else:
                self.between_tokens.observe(since_last / len(news.tokens))
        if news.finished:
            self.samples.labels(news.finish_reason or "error").inc()

    def _count_tokens(self, news: News) -> None:
        self.tokens.inc(len(news.tokens))
        self.rate.add(len(news.tokens))
        for token in news.tokens:
            self._depth_sum += token.depth
            self._depth_count += 1
            if self._depths is not None:
                self._depths.observe(token.depth)

    def loaded(self, load: Load) -> None:
        """The engine's own counts."""
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
