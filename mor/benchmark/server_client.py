"""A light client of the server: HTTP by hand over asyncio, in processes of its own, so that measuring costs the server
little."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]

HEAD_START = 0.3
"""Seconds that processes of clients get to take in their work, so that they begin together."""


@dataclass(kw_only=True)
class Answer:
    """What came back. `sent`: when the request was. `times`: of parts that brought events, in seconds from then on."""

    status: int = 0
    body: bytes = b""
    sent: float = 0.0
    times: list[float] = field(default_factory=list[float])

    @property
    def usage(self) -> dict[str, Any]:
        """The usage in a streamed response. Raises ValueError when it did not come to its end."""
        events = self.body.split(b"\n\n")
        if events[-2:] != [b"data: [DONE]", b""]:
            raise ValueError(f"a stream ended with {self.body[-200:]!r}")
        return json.loads(events[-3].removeprefix(b"data: "))["usage"]


def request_bytes(url: str, path: str, body: Body | bytes) -> bytes:
    """A POST of `body` that asks for the connection to be closed after it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


class _Exchange(asyncio.Protocol):
    """One request and all that comes back until the connection ends. It is taken apart at the end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._data = bytearray()
        self._sent, self._times = 0.0, list[float]()
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._sent = time.perf_counter()
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if b"data: " in data:
            self._times.append(time.perf_counter() - self._sent)
        self._data += data

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer.done():
            return
        head, end, rest = bytes(self._data).partition(b"\r\n\r\n")
        if exc is not None or not end:
            self.answer.set_exception(exc or ConnectionResetError("the connection ended before an answer"))
        else:
            self.answer.set_result(_answer(head, rest, sent=self._sent, times=self._times))


def _answer(head: bytes, rest: bytes, **seen: Any) -> Answer:
    body = _joined(rest) if b"transfer-encoding: chunked" in head.lower() else rest
    return Answer(status=int(head.split(b" ", 2)[1]), body=body, **seen)


def _joined(rest: bytes) -> bytes:
    """A body that was sent in chunks; one that broke off ends where it did."""
    parts, start = list[bytes](), 0
    while (end := rest.find(b"\r\n", start)) > start:
        size = int(rest[start:end], 16)
        parts.append(rest[end + 2 : end + 2 + size])
        start = end + 4 + size
    return b"".join(parts)


async def post(url: str, path: str, body: Body | bytes) -> Answer:
    """Send a request and read the whole answer. Raises OSError when the connection fails."""
    parts, request = urlsplit(url), request_bytes(url, path, body)
    transport, exchange = await asyncio.get_running_loop().create_connection(
        lambda: _Exchange(request), parts.hostname or "", parts.port or 80
    )
    try:
        return await exchange.answer
    finally:
        transport.close()


async def ask(url: str, bodies: Sequence[Body], streams: int) -> list[Answer]:
    """The answers to streamed completions, `streams` at a time, in the order in which they ended."""
    ahead, answers = list(reversed(bodies)), list[Answer]()

    async def client() -> None:
        while ahead:
            body = {**ahead.pop(), "stream": True, "stream_options": {"include_usage": True}}
            answers.append(await post(url, "/v1/completions", body))

    await asyncio.gather(*(client() for _ in range(streams)))
    return answers


class Clients:
    """Processes that ask, to be used in a `with`. They start by themselves, while a server does."""

    def __init__(self, processes: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends = list[Connection]()
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=_client, args=(theirs,), daemon=True).start()
            theirs.close()
            self._ends.append(ours)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *error: object) -> None:
        for end in self._ends:
            end.close()

    def ask(self, url: str, bodies: Sequence[Body], *, streams: int) -> list[Answer]:
        """As the function `ask`: they begin together and share the streams."""
        size, begin = len(self._ends), time.perf_counter() + HEAD_START
        for number, end in enumerate(self._ends):
            end.send((begin, url, bodies[number::size], len(range(number, streams, size))))
        return [answer for end in self._ends for answer in end.recv()]


def _client(end: Connection) -> None:
    with contextlib.suppress(EOFError):  # no more work
        while True:
            begin, url, bodies, streams = end.recv()
            time.sleep(max(0.0, begin - time.perf_counter()))
            end.send(asyncio.run(ask(url, bodies, streams)))


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The answer on a connection that was opened otherwise, to the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    rest = await reader.read(-1)
    return _answer(head, rest)
