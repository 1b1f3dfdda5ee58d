"""A process that runs the engine, seen from the server's event loop: messages in and out, and its end."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import Callable

from mor.serve.messages import FromEngine, Stop, ToEngine
from mor.serve.wire import WireProtocol
from mor.serve.worker import EngineSource, run_worker

END_SECONDS = 5.0
BUFFER = 2**22
"""Bytes that the engine may say before it waits for the loop to listen: a second or so of a fast one."""


class EngineProcess:
    """Starts at once. `hear` gets every message; then `ended` is called, once, when the process is gone for whatever
    reason. An engine that talks faster than the loop listens waits, because the socket between them is full.
    """

    def __init__(
        self, source: EngineSource, *, hear: Callable[[FromEngine], None], ended: Callable[[EngineProcess], None]
    ) -> None:
        self._ended = ended
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=run_worker, args=(source, theirs), name="mor-engine", daemon=True)
        self._process.start()
        theirs.close()
        self._wire = WireProtocol(hear=hear, lost=self._lost)
        self._gone = asyncio.Event()
        self._connecting = asyncio.create_task(self._connect(ours))
        self._ending: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Never waits. What is sent to a process that is gone is lost; `ended` tells."""
        self._wire.send(message)

    def kill(self) -> None:
        """End the process the hard way; `ended` follows."""
        self._process.kill()

    async def stop(self, *, listens: bool) -> None:
        """Ask the process to end, if it `listens`, and end it if it does not."""
        if listens:
            self.send(Stop())
            await asyncio.to_thread(self._process.join, END_SECONDS)
        self._process.kill()
        await self._gone.wait()

    async def _connect(self, ours: socket.socket) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self._wire, sock=ours)

    def _lost(self) -> None:
        self._ending = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        await asyncio.to_thread(self._process.join, END_SECONDS)
        self._process.kill()
        self._gone.set()
        self._ended(self)
