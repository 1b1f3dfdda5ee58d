"""How a stream of tokens becomes an HTTP response, whole or as server-sent events, while the client may go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mor.serve.errors import ApiError
from mor.serve.stream import Piece, Stream
from mor.serve.writers import Writer

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cut: Callable[[], None] = scope.get("state", {}).get("cut_connection", lambda: None)
        async with until_gone(self._stream, receive):
            try:
                await self._write(send)
            except TimeoutError:
                logger.info("a client did not read for %g s; it is cut off", self._write_seconds)
                cut()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, self._writer.first_chunks())
        try:
            while news := await self._stream.next():
                await self._send(send, self._writer.chunks(news))
            if not self._stream.is_done:
                return  # the client is gone
            await self._send(send, self._writer.last_chunks(), "data: [DONE]\n\n")
        except ApiError as error:
            await self._send(send, [error.body()])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunks: list[dict[str, Any]], after: str = "") -> None:
        events = "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks) + after
        if events:
            async with asyncio.timeout(self._write_seconds):
                await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
