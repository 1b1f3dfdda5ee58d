"""How a stream of tokens becomes an HTTP response, whole or as server-sent events, while the client may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mor.serve.errors import ApiError
from mor.serve.stream import Piece, Stream
from mor.serve.writers import Writer, encode


class ClientGone(Exception):
    """Nobody is there to be answered."""


@asynccontextmanager
async def until_gone(stream: Stream, receive: Receive) -> AsyncIterator[None]:
    """Close `stream` when the client goes away, and when the block ends for whatever reason."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


async def read_all(stream: Stream, request: Request) -> list[Piece]:
    """Everything that comes until all choices are finished. Raises ClientGone, or ApiError when the request failed."""
    pieces: list[Piece] = []
    async with until_gone(stream, request.receive):
        await stream.accepted()
        while news := await stream.next():
            pieces += news
    if not stream.is_done:
        raise ClientGone
    return pieces


class EventStream(Response):
    """Server-sent events: each chunk as it comes, `[DONE]` at the end, an error in between if need be.

    What has come while the client was not ready goes out together.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, writer: Writer) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._writer = stream, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with until_gone(self._stream, receive):
            await self._write(send)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        before = self._writer.first_events()
        try:
            while True:
                news = await self._stream.next()
                events = before + self._writer.events(news)
                if self._stream.is_done:
                    break
                if not news:
                    return  # the client is gone
                await self._send(send, events)
                before = ""
            events += self._writer.last_events()
        except ApiError as error:
            events = f"data: {encode(error.body())}\n\n"
        await self._send(send, events, is_last=True)

    async def _send(self, send: Send, events: str, *, is_last: bool = False) -> None:
        await send({"type": "http.response.body", "body": events.encode(), "more_body": not is_last})
