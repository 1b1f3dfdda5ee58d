"""Running the application under uvicorn: slow connections are cut, and SIGTERM ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mor.serve.options import ServeOptions
from mor.serve.service import Service

logger = logging.getLogger(__name__)

SPARE_CONNECTIONS = 64
"""Beyond the limit, so that those over it are told in the usual form; the rest gets uvicorn's plain 503."""


class Connection(H11Protocol):
    """A connection that has `header_seconds` to send the head of a request, and `write_seconds` to take something of
    what is written to it, be it the piece of a stream or all of a long answer. Then it is cut off.
    """

    header_seconds = 20.0
    write_seconds = 20.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: TimerHandle | None = None
        self._next_look: TimerHandle | None = None
        self._unwritten = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that nothing more is written while something is unwritten
        self._set_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unwritten = self.transport.get_write_buffer_size()
        self._next_look = self.loop.call_later(self.write_seconds, self._look)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_looking()

    def _look(self) -> None:
        """Has the client taken anything since the last look?"""
        before, self._unwritten = self._unwritten, self.transport.get_write_buffer_size()
        if self._unwritten < before:
            self._next_look = self.loop.call_later(self.write_seconds, self._look)
        else:
            logger.info("a client did not read for %g s; it is cut off", self.write_seconds)
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._stop_looking()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        """Count the time while a head is expected, from its first byte; between requests uvicorn's own limit holds."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._clear_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Ends in order on SIGTERM or SIGINT: takes no new work, finishes what is open, exits with 0. A second signal
    ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Begin to end; the second time, at once."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        else:
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        engine = self._service.engine
        logger.info("ending: %d samples are open", engine.num_open)
        engine.drain()
        if not await engine.until_idle(self._drain_seconds):
            logger.warning("%d samples did not end within %g s", engine.num_open, self._drain_seconds)
            engine.give_up()
        self.should_exit = True

    @property
    def port(self) -> int:
        """The port it listens on, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])


def make_server(app: FastAPI, options: ServeOptions, *, log_level: str = "warning") -> Server:
    """A server to run with `serve()` in an event loop."""
    limits = {"header_seconds": options.read_seconds, "write_seconds": options.write_seconds}
    protocol = type("Connection", (Connection,), limits)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=protocol,
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=log_level in ("info", "debug"),
        server_header=False,
        proxy_headers=False,
        limit_concurrency=options.max_connections + SPARE_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return Server(config, app.state.service, options.drain_seconds)


async def serve(app: FastAPI, options: ServeOptions, *, log_level: str = "warning") -> None:
    """Serve until a signal. Raises RuntimeError when the engine failed for good."""
    server, engine = make_server(app, options, log_level=log_level), app.state.service.engine
    failed = False

    async def announce() -> None:
        nonlocal failed
        if await engine.until("ready", "failed") == "ready":
            print(f"ready: {options.model_name} at http://{options.host}:{server.port}", flush=True)
            await engine.until("failed")
        failed = server.should_exit = True

    announcer = asyncio.create_task(announce())
    gc.freeze()  # or every thorough collection would go through all that was imported, while clients wait
    try:
        await server.serve()
    finally:
        announcer.cancel()
    if failed:
        raise RuntimeError(engine.reason or "the engine crashed again after its restart")
