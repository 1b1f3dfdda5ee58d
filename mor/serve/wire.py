"""Messages over a pair of sockets: each is its length in four bytes, then itself, pickled.

Both ends belong to one program and nothing from outside is ever unpickled.
"""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
from collections.abc import Callable
from typing import Any, cast

HEAD = 4


def pack(message: Any) -> bytes:
    """A message as it travels."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(HEAD, "big") + content


class Wire:
    """The engine's end, which waits."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Any) -> None:
        """Waits while the other end does not read. Raises OSError when it is gone."""
        self._end.sendall(pack(message))

    def poll(self) -> bool:
        """Whether there is something to receive, be it the end."""
        return bool(select.select([self._end], [], [], 0)[0])

    def receive(self) -> Any:
        """The next message, waiting for it. Raises EOFError when the other end is gone."""
        return pickle.loads(self._read(int.from_bytes(self._read(HEAD), "big")))

    def _read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = self._end.recv(min(size, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class WireProtocol(asyncio.Protocol):
    """The server's end, which never waits: `hear` gets each message, `lost` is called when the other end is gone."""

    def __init__(self, *, hear: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._hear, self._lost = hear, lost
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []

    def send(self, message: Any) -> None:
        """What is sent before the connection is made waits for it."""
        if self._transport is None:
            self._unsent.append(pack(message))
        else:
            self._transport.write(pack(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._transport.writelines(self._unsent)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        start = 0
        while len(self._unread) >= start + HEAD:
            end = start + HEAD + int.from_bytes(self._unread[start : start + HEAD], "big")
            if len(self._unread) < end:
                break
            message = pickle.loads(memoryview(self._unread)[start + HEAD : end].tobytes())
            start = end
            self._hear(message)
        del self._unread[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()
