"""A light client of the server: HTTP by hand over asyncio, so that measuring costs the server's machine little."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(kw_only=True)
class Answer:
    """What came back. `times`: of each part of the body, in seconds since the request was sent."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    times: list[float] = field(default_factory=list[float])

    @property
    def usage(self) -> dict[str, Any]:
        """The usage in a streamed response. Raises ValueError when it did not come to its end."""
        events = self.body.split(b"\n\n")
        if events[-2:] != [b"data: [DONE]", b""]:
            raise ValueError(f"a stream ended with {bytes(self.body[-200:])!r}")
        return json.loads(events[-3].removeprefix(b"data: "))["usage"]


def request_bytes(url: str, path: str, body: dict[str, Any] | bytes) -> bytes:
    """A POST of `body` that asks for the connection to be closed after it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def post(url: str, path: str, body: dict[str, Any] | bytes) -> Answer:
    """Send a request and read the whole answer. Raises OSError when the connection fails."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        start = time.perf_counter()
        writer.write(request_bytes(url, path, body))
        await writer.drain()
        return await read_answer(reader, start)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader, start: float) -> Answer:
    """The answer, to the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    answer = Answer(status=int(head.split(b" ", 2)[1]))
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    while True:
        if is_chunked:
            size = int(await reader.readline(), 16)
            part = (await reader.readexactly(size + 2))[:-2]
        else:
            part = await reader.read(2**16)
        if not part:
            return answer
        answer.body += part
        answer.times.append(time.perf_counter() - start)
