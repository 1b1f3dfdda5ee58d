"""The server beside the engine alone, on the same requests."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.benchmark.server_client import Answer, post
from mor.benchmark.server_process import cpu_seconds, server_process
from mor.engine.engine import Engine
from mor.engine.options import EngineOptions
from mor.engine.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens per second, and milliseconds of processor time per token, of the engine's process and of the server's.
    Seconds: `first_token` and `gap` at the median, `first_token_99` for one in a hundred.
    """

    tokens_per_second: float
    engine_cpu: float
    server_cpu: float = 0.0
    first_token: float | None = None
    first_token_99: float | None = None
    gap: float | None = None


def make_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, which have no prefixes in common."""
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def measure_offline(model: str | Path, prompts: Sequence[list[int]], *, tokens: int, streams: int) -> Measured:
    """The engine alone, `streams` at a time."""
    engine = Engine.from_pretrained(model, options=EngineOptions(max_requests=streams, prefix_caching=False))
    params = SamplingParams(max_tokens=tokens, seed=0, ignore_eos=True)
    engine.generate(prompts[:streams], SamplingParams(max_tokens=4, seed=0, ignore_eos=True), progress=False)
    start, cpu = time.perf_counter(), time.process_time()
    count = sum(len(output.tokens) for output in engine.generate(prompts, params, progress=False))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Measured(tokens_per_second=count / seconds, engine_cpu=1000 * cpu / count)


def measure_server(
    model: str | Path, prompts: Sequence[list[int]], *, tokens: int, streams: int, options: Sequence[str] = ()
) -> Measured:
    """The same requests over HTTP, streamed, `streams` at a time."""
    fixed = ["--max-requests", str(streams), "--no-prefix-caching", *options]
    with server_process(model, fixed) as (url, pids):
        body = {"max_tokens": tokens, "seed": 0, "ignore_eos": True, "stream": True}
        asyncio.run(_ask_all(url, prompts[:streams], {**body, "max_tokens": 4}, streams))
        start, before = time.perf_counter(), [cpu_seconds(pid) for pid in pids]
        answers = asyncio.run(_ask_all(url, prompts, body, streams))
        seconds = time.perf_counter() - start
        server, engine = (cpu_seconds(pid) - was for pid, was in zip(pids, before))
    return summarise(answers, seconds, server_cpu=server, engine_cpu=engine)


def summarise(answers: Sequence[Answer], seconds: float, *, server_cpu: float, engine_cpu: float) -> Measured:
    """What was seen by the clients. Raises ValueError when an answer is not whole."""
    firsts = sorted(answer.times[0] for answer in answers)
    gaps = [later - earlier for answer in answers for earlier, later in zip(answer.times, answer.times[1:])]
    count = sum(answer.usage["completion_tokens"] for answer in answers)
    return Measured(
        tokens_per_second=count / seconds,
        engine_cpu=1000 * engine_cpu / count,
        server_cpu=1000 * server_cpu / count,
        first_token=statistics.median(firsts),
        first_token_99=firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))],
        gap=statistics.median(gaps) if gaps else None,
    )


async def _ask_all(url: str, prompts: Sequence[list[int]], body: dict[str, Any], streams: int) -> list[Answer]:
    """All prompts, `streams` at a time."""
    ahead, answers = list(reversed(prompts)), list[Answer]()

    async def client() -> None:
        while ahead:
            asked = {**body, "prompt": ahead.pop(), "stream_options": {"include_usage": True}}
            answers.append(await post(url, "/v1/completions", asked))

    await asyncio.gather(*(client() for _ in range(streams)))
    return answers
