"""Clients of several replicas, one of which is killed under load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx


@dataclass(kw_only=True)
class Outcomes:
    """How requests ended: whole, with an error that says so (or a connection that broke off), or otherwise."""

    whole: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list[str])


async def crowd(url: str, *, num_clients: int, each: int, tokens: int, kill: Callable[[], None]) -> Outcomes:
    """`num_clients` ask `each` streams of `tokens` one after the other; `kill` is called when half are done."""
    outcomes, done = Outcomes(), 0

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal done
        body = {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
                lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
        except httpx.HTTPError:
            outcomes.failed += 1
        else:
            judge(outcomes, reply.status_code, lines, tokens)
        done += 1
        if done == num_clients * each // 2:
            kill()

    async def several(client: httpx.AsyncClient) -> None:
        for _ in range(each):
            await one(client)

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(several(client) for _ in range(num_clients)))
    return outcomes


def judge(outcomes: Outcomes, status: int, lines: list[str], tokens: int) -> None:
    """A stream is whole, or it says that it is not."""
    count = sum(len(choice["depths"]) for line in lines if '"depths"' in line for choice in json.loads(line)["choices"])
    if status == 200 and lines[-1:] == ["[DONE]"] and count == tokens:
        outcomes.whole += 1
    elif status >= 500 or any('"error"' in line for line in lines) or lines[-1:] != ["[DONE]"]:
        outcomes.failed += 1
    else:
        outcomes.wrong.append(f"{status}: {lines[-1:]}, {count} tokens")
