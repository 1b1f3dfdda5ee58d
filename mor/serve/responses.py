"""How a stream of tokens becomes an HTTP response, whole or as server-sent events, while the client may go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mor.serve.errors import ApiError
from mor.serve.stream import Piece, Stream
from mor.serve.writers import Writer, encode

logger = logging.getLogger(__name__)


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

    What has come while the client was not ready goes out together. A client that does not take what is written to it
    within `write_seconds` is cut off.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, writer: Writer, *, write_seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._writer, self._write_seconds = stream, writer, write_seconds
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cut: Callable[[], None] = scope.get("state", {}).get("cut_connection", lambda: None)
        async with until_gone(self._stream, receive):
            try:
                async with self._patience():
                    await self._write(send)
            except TimeoutError:
                logger.info("a client did not read for %g s; it is cut off", self._write_seconds)
                cut()

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Raises TimeoutError when a write takes too long. Looked at now and then: a timer of its own for each of
        thousands of writes a second would cost as much as they do.
        """
        loop = asyncio.get_running_loop()

        def look() -> None:
            nonlocal timer
            if self._writing_since is not None and loop.time() - self._writing_since > self._write_seconds:
                limit.reschedule(loop.time())
            else:
                timer = loop.call_later(self._write_seconds / 4, look)

        timer = loop.call_later(self._write_seconds / 4, look)
        try:
            async with asyncio.timeout(None) as limit:
                yield
        finally:
            timer.cancel()

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        before = self._writer.first_events()
        try:
            while True:
                news = await self._stream.next()
                events = before + self._writer.events(news)
                if self._stream.is_done:
                    break
                if not news:
                    return  # the client is gone
                await self._send_events(send, events)
                before = ""
            events += self._writer.last_events()
        except ApiError as error:
            events = f"data: {encode(error.body())}\n\n"
        await self._send_events(send, events, is_last=True)

    async def _send_events(self, send: Send, events: str, *, is_last: bool = False) -> None:
        await self._send(send, {"type": "http.response.body", "body": events.encode(), "more_body": not is_last})

    async def _send(self, send: Send, message: Message) -> None:
        self._writing_since = asyncio.get_running_loop().time()
        await send(message)
        self._writing_since = None
