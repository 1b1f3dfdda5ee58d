"""A stream between an engine that feeds and a client that reads, at whatever pace."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from mor.serve.errors import ApiError, engine_lost
from mor.serve.messages import News, Token
from mor.serve.stream import Piece, Stream


def piece(choice: int, *tokens: int, end: bool = False) -> Piece:
    news = News(
        id="s",
        prompt_tokens=1,
        cached_tokens=0,
        text="x" * len(tokens),
        depths=(1,) * len(tokens),
        tokens=tuple(Token(token, 0, -1.0, (), 1) for token in tokens),
        finish_reason="stop" if end else None,
        error=None,
    )
    return Piece(choice=choice, news=news)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 5))


def make(num_choices: int = 1, max_unread: int = 100) -> tuple[Stream, list[Stream]]:
    closed: list[Stream] = []
    return Stream(num_choices, max_unread=max_unread, closed=closed.append), closed


def test_what_came_meanwhile_is_read_together() -> None:
    async def work() -> None:
        stream, closed = make(2)
        stream.feed(piece(0, 1))
        stream.feed(piece(1, 2, end=True))
        assert [(each.choice, each.news.tokens[0].token) for each in await stream.next()] == [(0, 1), (1, 2)]
        assert not stream.is_done
        reading = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        stream.feed(piece(0, 3, end=True))
        assert len(await reading) == 1
        assert await stream.next() == [] and stream.is_done
        stream.close()
        stream.close()
        assert closed == [stream]

    run(work())


def test_a_reader_that_leaves_too_much_loses_its_request() -> None:
    async def work() -> None:
        stream, closed = make(max_unread=3)
        stream.feed(piece(0, 1, 2, 3))
        assert closed == []
        stream.feed(piece(0, 4))
        assert closed == [stream]
        with pytest.raises(ApiError, match="unread"):
            await stream.next()
        stream.feed(piece(0, 5))  # nothing more is kept
        assert stream._unread == []

    run(work())


def test_what_was_finished_is_read_even_if_the_engine_is_lost() -> None:
    async def work() -> None:
        stream, _ = make()
        stream.feed(piece(0, 1, end=True))
        stream.fail(engine_lost())
        assert len(await stream.next()) == 1 and await stream.next() == []

    run(work())


def test_a_failure_wakes_who_waits() -> None:
    async def work() -> None:
        stream, closed = make()
        waiting, reading = asyncio.create_task(stream.accepted()), asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        stream.fail(engine_lost())
        for task in (waiting, reading):
            with pytest.raises(ApiError):
                await task
        assert closed == [stream]

    run(work())


def test_closing_wakes_who_waits() -> None:
    async def work() -> None:
        stream, _ = make()
        reading = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        stream.close()
        assert await reading == [] and not stream.is_done

    run(work())
