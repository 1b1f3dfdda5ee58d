"""The server beside the engine alone, on the same requests."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mor.benchmark.server_client import Answer, Body, Clients
from mor.benchmark.server_process import cpu_seconds, started
from mor.engine.engine import Engine
from mor.engine.options import EngineOptions
from mor.engine.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked: prompts as token ids, how much each generates at which mean depth, and how many at a time."""

    prompts: Sequence[list[int]]
    lengths: Sequence[int]
    streams: int
    mean_depth: float | None = None

    @classmethod
    def random(
        cls,
        *,
        requests: int,
        prompt: int,
        tokens: int,
        vocab_size: int,
        streams: int,
        mean_depth: float | None = None,
        seed: int = 0,
    ) -> Load:
        """Prompts without prefixes in common, continued by `tokens` on average, from half to one and a half times as
        many: requests of one length would all end, and all begin, together.
        """
        draw = random.Random(seed)
        return cls(
            prompts=[[draw.randrange(vocab_size) for _ in range(prompt)] for _ in range(requests)],
            lengths=[draw.randint(-(-tokens // 2), tokens + tokens // 2) for _ in range(requests)],
            streams=streams,
            mean_depth=mean_depth,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(self.lengths)

    def warming(self) -> Load:
        """A short one that makes whoever serves it ready."""
        prompts = self.prompts[: self.streams]
        return Load(prompts=prompts, lengths=[20] * len(prompts), streams=self.streams, mean_depth=self.mean_depth)

    def params(self) -> list[SamplingParams]:
        """As the engine takes it."""
        return [
            SamplingParams(max_tokens=length, seed=0, ignore_eos=True, mean_depth=self.mean_depth)
            for length in self.lengths
        ]

    def bodies(self) -> list[Body]:
        """As the server takes it."""
        dial = {} if self.mean_depth is None else {"mean_depth": self.mean_depth}
        return [
            {"prompt": prompt, "max_tokens": length, "seed": 0, "ignore_eos": True, **dial}
            for prompt, length in zip(self.prompts, self.lengths, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens per second, and microseconds of processor time per token, of the engine's process and of the server's.
    Seconds: `first_token` and `gap` (between the pieces that a stream comes in) at the median, `_99` for one in a
    hundred. `piece`: tokens that come together.
    """

    tokens_per_second: float
    engine_cpu: float
    server_cpu: float = 0.0
    first_token: float | None = None
    first_token_99: float | None = None
    gap: float | None = None
    gap_99: float | None = None
    piece: float | None = None


def engine_options(streams: int, kv_memory_gib: float | None) -> EngineOptions:
    """Of an engine that is measured, alone or in a server."""
    return EngineOptions(max_requests=streams, prefix_caching=False, kv_memory_gib=kv_memory_gib)


def measure_offline(model: str | Path, load: Load, options: EngineOptions, *, rounds: int = 1) -> list[Measured]:
    """The engine alone, without texts, `rounds` times."""
    engine = Engine.from_pretrained(model, options=options)
    engine.warm_up()
    engine.generate(load.warming().prompts, load.warming().params(), progress=False)
    while engine.warm_up_one():  # as a server does while it waits
        pass
    return [_measure_offline(engine, load) for _ in range(rounds)]


def _measure_offline(engine: Engine, load: Load) -> Measured:
    start, cpu = time.perf_counter(), time.process_time()
    outputs = engine.generate(load.prompts, load.params(), progress=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    count = sum(len(output.token_ids) for output in outputs)
    return Measured(tokens_per_second=count / seconds, engine_cpu=1e6 * cpu / count)


def measure_server(command: Sequence[str], load: Load, *, processes: int = 1, rounds: int = 1) -> list[Measured]:
    """The same requests over HTTP, streamed, to the server that `command` starts; `processes` clients ask them."""
    with Clients(processes) as clients, started(command) as (url, pids):
        clients.ask(url, load.warming().bodies(), streams=load.streams)
        return [_measure_server(url, pids, load, clients) for _ in range(rounds)]


def _measure_server(url: str, pids: Sequence[int], load: Load, clients: Clients) -> Measured:
    before = [cpu_seconds(pid) for pid in pids]
    answers = clients.ask(url, load.bodies(), streams=load.streams)
    server, engine = (cpu_seconds(pid) - was for pid, was in zip(pids, before))
    return summarise(answers, server_cpu=server, engine_cpu=engine)


def summarise(answers: Sequence[Answer], *, server_cpu: float, engine_cpu: float) -> Measured:
    """What was seen by the clients. Raises ValueError when an answer is not whole."""
    firsts = [answer.times[0] for answer in answers]
    gaps = [later - earlier for answer in answers for earlier, later in zip(answer.times, answer.times[1:])]
    count = sum(answer.usage["completion_tokens"] for answer in answers)
    seconds = max(answer.sent + answer.times[-1] for answer in answers) - min(answer.sent for answer in answers)
    return Measured(
        tokens_per_second=count / seconds,
        engine_cpu=1e6 * engine_cpu / count,
        server_cpu=1e6 * server_cpu / count,
        first_token=statistics.median(firsts),
        first_token_99=share(firsts, 0.99),
        gap=statistics.median(gaps) if gaps else None,
        gap_99=share(gaps, 0.99) if gaps else None,
        piece=count / sum(len(answer.times) for answer in answers),
    )


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
