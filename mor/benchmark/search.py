"""The number of sequences at which an arm is fastest in a pool."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch

from mor.benchmark.arms import Arm
from mor.benchmark.serving import Served, make_engine, serve, warm_up
from mor.benchmark.workload import Workload

FINER = 1.25
SLOWER = 0.95
"""Doubling ends at a try that is slower than this share of the fastest."""
TRIAL = 3
"""Requests of a try, per sequence: one part to begin with, one that is measured, one to end with."""


class Search:
    """Tries of one arm in one pool. `tried`: by number of sequences that ran."""

    def __init__(
        self, arm: Arm, workload: Workload, num_pages: int, temperature: float, report: Callable[[str], None]
    ) -> None:
        self.tried: dict[int, Served] = {}
        self._arm, self._workload, self._num_pages = arm, workload, num_pages
        self._temperature, self._report = temperature, report
        self._most: float = math.inf  # that the pool let run

    @property
    def best(self) -> int:
        """The number of sequences that was fastest."""
        return max(self.tried, key=lambda number: self.tried[number].best_rate)

    def attempt(self, concurrency: int) -> bool:
        """Serve a trial of so many sequences; whether the pool let that many run. It counts at the number that ran."""
        arm, trial = self._arm, self._workload.at_least(TRIAL * concurrency).first(TRIAL * concurrency)
        engine = make_engine(arm, concurrency=concurrency, num_pages=self._num_pages)
        warm_up(engine, [concurrency], trial.longest)
        serve(engine, trial.first(concurrency).shortened(2), mean_depth=arm.mean_depth)
        served = serve(engine, trial.staggered(concurrency), mean_depth=arm.mean_depth, temperature=self._temperature)
        self.tried[served.most_running] = served
        self._report(f"{arm.name} at {served.most_running} sequences: {describe(served, engine.pool.num_pages)}")
        del engine
        gc.collect()  # an engine is a ring of references; its pages would stay beside those of the next
        if arm.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if served.most_running < concurrency:
            self._most = served.most_running
        return served.most_running == concurrency

    def run(self, first: int) -> int:
        """Try `first`, twice as many, ... until that is slower or the pool holds no more; then in steps of a quarter
        around the fastest, up and else down, while that is faster. Returns the fastest."""
        concurrency = first
        while self.attempt(concurrency) and self._share(concurrency) >= SLOWER:
            concurrency *= 2
        start = self.best
        for factor in (FINER, 1 / FINER):
            near = round(start * factor)
            while self._is_new(near) and self.attempt(near) and self.best == near:
                near = round(near * factor)
            if self.best != start:
                break
        return self.best

    def _is_new(self, concurrency: int) -> bool:
        return 1 <= concurrency <= self._most and concurrency not in self.tried

    def _share(self, concurrency: int) -> float:
        return self.tried[concurrency].best_rate / self.tried[self.best].best_rate


def describe(served: Served, num_pages: int) -> str:
    """A try in words."""
    part = "" if served.steady_tokens_per_second else " (of the whole run)"
    return (
        f"{served.best_rate:,.0f} tokens/s{part}, {served.rows_per_visit:.1f} rows a visit, {served.pages:,.0f} of "
        f"{num_pages:,} pages in use ({served.most_pages:,} at most), {served.preemptions} preempted"
    )
