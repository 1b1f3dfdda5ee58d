"""Long prompts that keep coming, beside streams that are under way: who waits how long?"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mor.benchmark.server_client import Answer, Body, ask, post
from mor.benchmark.server_process import started
from mor.benchmark.server_throughput import Load, share


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Seconds to the first token and between the pieces that streams come in, at the median and for one in a hundred.
    `tokens_per_second`: of prompts and of outputs."""

    requests: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    first_token: float
    first_token_99: float
    gap: float
    gap_99: float


@dataclass(frozen=True, kw_only=True)
class Queue:
    """`alone`: short requests by themselves. `beside`: they beside long prompts; `long`: these."""

    alone: Waits
    beside: Waits
    long: Waits


def measure_queue(command: Sequence[str], short: Load, long: Load, *, seconds: float) -> Queue:
    """Keep `short.streams` short requests under way for `seconds`, alone, and then as long beside `long.streams` long
    ones, each of which is followed by the next as soon as it ends.
    """
    with started(command) as (url, _):
        for load in (short, long):
            asyncio.run(ask(url, load.warming().bodies(), load.streams))
        (alone,) = asyncio.run(_keep_asking(url, [short], seconds))
        beside, queued = asyncio.run(_keep_asking(url, [short, long], seconds))
    return Queue(alone=alone, beside=beside, long=queued)


async def _keep_asking(url: str, loads: Sequence[Load], seconds: float) -> list[Waits]:
    """What each load saw while all of them went on; what began in time is waited for."""
    end = time.perf_counter() + seconds

    async def client(bodies: Iterator[Body], answers: list[Answer]) -> None:
        while time.perf_counter() < end:
            body = {**next(bodies), "stream": True, "stream_options": {"include_usage": True}}
            answers.append(await post(url, "/v1/completions", body))

    found = [list[Answer]() for _ in loads]
    queues = [itertools.cycle(load.bodies()) for load in loads]
    async with asyncio.TaskGroup() as group:
        for load, queue, answers in zip(loads, queues, found, strict=True):
            for _ in range(load.streams):
                group.create_task(client(queue, answers))
    return [_waits(answers) for answers in found]


def _waits(answers: Sequence[Answer]) -> Waits:
    """Raises ValueError when an answer is not whole."""
    firsts = [answer.times[0] for answer in answers]
    gaps = [later - earlier for answer in answers for earlier, later in itertools.pairwise(answer.times)]
    seconds = max(answer.sent + answer.times[-1] for answer in answers) - min(answer.sent for answer in answers)
    usages = [answer.usage for answer in answers]
    return Waits(
        requests=len(answers),
        prompt_tokens_per_second=sum(usage["prompt_tokens"] for usage in usages) / seconds,
        tokens_per_second=sum(usage["completion_tokens"] for usage in usages) / seconds,
        first_token=statistics.median(firsts),
        first_token_99=share(firsts, 0.99),
        gap=statistics.median(gaps),
        gap_99=share(gaps, 0.99),
    )
