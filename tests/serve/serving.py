"""A real server in a thread of the test, on a port of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from mor.serve.async_engine import AsyncEngine
from mor.serve.options import ServeOptions
from mor.serve.run import Server, make_server
from mor.serve.server import create_app
from mor.serve.service import Service
from tests.serve.sources import TinySource
from tests.serve.tiny_engine import TOKENIZER

SECONDS = 60
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<{{ m['role'] }}{{ ' ' + m['name'] if 'name' in m }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(kw_only=True)
class Running:
    """A server that listens. `client`: on it."""

    server: Server
    service: Service
    loop: asyncio.AbstractEventLoop
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def engine(self) -> AsyncEngine:
        return self.service.engine

    def complete(self, prompt: Any = "abc", **fields: Any) -> httpx.Response:
        """Ask for a completion."""
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def chat(self, *texts: str, **fields: Any) -> httpx.Response:
        """Ask for the next turn after those of a user."""
        messages = [{"role": "user", "content": text} for text in texts]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def wait_until(self, condition: Any, seconds: float = 20.0) -> None:
        """Wait for something that happens elsewhere."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.01)

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.client.get("/health").status_code == 200, SECONDS)


@contextmanager
def running(source: TinySource | None = None, *, ready: bool = True, **options: Any) -> Iterator[Running]:
    """A server with `options` on the engine of `source`."""
    settings = ServeOptions(**{"model_name": "tiny", "port": 0, **options})
    source = TinySource() if source is None else source
    app = create_app(source, TOKENIZER, settings, max_running=source.options.get("max_requests", 16), template=TEMPLATE)
    server, loop = make_server(app, settings), asyncio.new_event_loop()
    server.capture_signals = nothing  # type: ignore[method-assign]  # signals belong to the main thread
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=SECONDS) as client:
            running = Running(server=server, service=app.state.service, loop=loop, client=client)
            if ready:
                running.wait_ready()
            yield running
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        loop.close()


@contextmanager
def nothing() -> Iterator[None]:
    yield


def events(response: httpx.Response) -> list[Any]:
    """The chunks of a streamed response, without the `[DONE]` that must end it."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error that a response must be."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
