"""A crowd of clients of all kinds at once, and what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mor.benchmark.server_client import post, read_answer, request_bytes
from mor.benchmark.server_process import memory, metric, server_process

PATH = "/v1/completions"
OPTIONS = ("--no-prefix-caching", "--max-requests", "64", "--max-waiting", "256", "--threads", "1")
MALFORMED = (
    b"{",
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "unknown": 1}',
    b'{"prompt": 5}',
    b"[" * 5000,
)


@dataclass(kw_only=True)
class Crowd:
    """Clients of one server until `end`. `seen`: how often what happened, by kind of client. `first`: seconds to the
    first token of the well-behaved."""

    url: str
    end: float
    seen: collections.Counter[str] = field(default_factory=collections.Counter[str])
    first: list[float] = field(default_factory=list[float])

    async def well_behaved(self, draw: random.Random) -> None:
        """Reads what it asked for; comes back when it is told to."""
        tokens = draw.randrange(5, 40)
        body = {"prompt": "def read", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        while True:
            answer = await post(self.url, PATH, {**body, "stream_options": {"include_usage": True}})
            if answer.status != 429:
                break
            self.seen["well-behaved: told to come back"] += 1
            await asyncio.sleep(draw.uniform(0.5, 1.5))
        served = answer.status == 200 and answer.usage["completion_tokens"] == tokens
        self.seen["well-behaved: served" if served else f"well-behaved: FAILED with {answer.status}"] += 1
        if served:
            self.first.append(answer.times[0])

    async def malformed(self, draw: random.Random) -> None:
        answer = await post(self.url, PATH, draw.choice(MALFORMED))
        self.seen[f"malformed: {answer.status}"] += 1

    async def huge(self, draw: random.Random) -> None:
        """Says that it will send too much, or asks for too much."""
        body: Any = b"x" * 3_000_000 if draw.random() < 0.3 else {"prompt": "word " * 5000, "max_tokens": 10}
        answer = await post(self.url, PATH, body)
        self.seen[f"huge: {answer.status}"] += 1

    async def slow(self, draw: random.Random) -> None:
        """Sends its request bit by bit, and reads the answer as slowly."""
        reader, writer = await self._connect()
        try:
            data = request_bytes(self.url, PATH, {"prompt": "import", "max_tokens": 20, "stream": True})
            for start in range(0, len(data), 40):
                writer.write(data[start : start + 40])
                await writer.drain()
                await asyncio.sleep(draw.uniform(0.05, 0.4))
            await asyncio.sleep(draw.uniform(0, 3))
            answer = await read_answer(reader)
            self.seen[f"slow: {answer.status}"] += 1
        finally:
            writer.close()

    async def vanishing(self, draw: random.Random) -> None:
        """Goes away before, while or after the first tokens come."""
        reader, writer = await self._connect()
        writer.write(request_bytes(self.url, PATH, {"prompt": "class", "max_tokens": 200, "stream": True, "n": 2}))
        await writer.drain()
        if draw.random() < 0.7:
            await reader.read(2000)
        writer.transport.abort()
        self.seen["vanishing: gone"] += 1

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        return await asyncio.open_connection(parts.hostname, parts.port)

    async def client(self, number: int) -> None:
        """One client, of the kind that its number says, again and again."""
        kinds: list[tuple[str, Callable[[random.Random], Coroutine[None, None, None]]]] = [
            (kind, getattr(self, kind)) for kind in ("well_behaved", "malformed", "huge", "slow", "vanishing")
        ]
        draw = random.Random(number)
        kind, act = kinds[number % len(kinds)]
        while time.monotonic() < self.end:
            try:
                await act(draw)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.seen[f"{kind}: {type(error).__name__}"] += 1
            await asyncio.sleep(draw.uniform(0.2, 2.0))


async def watch_crowd(model: str | Path, *, num_clients: int, seconds: float) -> dict[str, Any]:
    """Let `num_clients` loose on a server for `seconds`, a tenth of it to warm up before memory is read.

    Returns what was seen, what is still open afterwards, and how memory changed.
    """
    with server_process(model, OPTIONS) as (url, pids):
        pages = metric(url, "mor_kv_pages_total")
        crowd = Crowd(url=url, end=time.monotonic() + seconds / 10)
        await asyncio.gather(*(crowd.client(number) for number in range(num_clients)))
        await _settle(url)
        before = [memory(pid) for pid in pids]
        crowd = Crowd(url=url, end=time.monotonic() + seconds)
        await asyncio.gather(*(crowd.client(number) for number in range(num_clients)))
        await _settle(url)
        after = [memory(pid) for pid in pids]
        free = metric(url, "mor_kv_pages_free")
    first = sorted(crowd.first)
    return {
        "seen": dict(sorted(crowd.seen.items())),
        "pages leaked": int(pages - free),
        "memory before, MiB": [round(size / 2**20, 1) for size in before],
        "memory after, MiB": [round(size / 2**20, 1) for size in after],
        "first token, median and p99, s": [first[len(first) // 2], first[int(0.99 * len(first))]] if first else None,
    }


async def _settle(url: str) -> None:
    """Wait until nothing runs."""
    for _ in range(300):
        await asyncio.sleep(0.2)
        busy = await asyncio.to_thread(metric, url, "mor_requests_running")
        if not busy and not await asyncio.to_thread(metric, url, "mor_requests_waiting"):
            return
    raise RuntimeError("the server does not come to rest")
