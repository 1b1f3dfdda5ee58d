"""What stands between a connection and the routes: the key, limits of size and time, headers, and counting."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.serve.errors import ApiError, too_large, too_many
from mor.serve.metrics import Metrics
from mor.serve.writers import encode

logger = logging.getLogger(__name__)

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OPEN_PATHS = ("/", "/health", "/openapi.json")
OPEN_FOLDER = "/page/"


class JsonResponse(Response):
    """JSON as `writers.encode` writes it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content).encode()


def error_response(error: ApiError) -> JsonResponse:
    """The answer that says what went wrong."""
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers())


class Guard:
    """The outermost layer of the application.

    It adds the security headers, asks for the key (compared in constant time), bounds how many requests there are, how
    large they are and how long they take to come, counts responses, and answers 500 without a trace when something
    failed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        known_paths: frozenset[str],
        api_key: str | None,
        max_requests: int,
        max_body_bytes: int,
        read_seconds: float,
    ) -> None:
        self._max_requests, self._num_requests = max_requests, 0
        self._app, self._metrics, self._known_paths = app, metrics, known_paths
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes, self._read_seconds = max_body_bytes, read_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                path = scope["path"] if scope["path"] in self._known_paths else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        body = _Body(receive, self._max_body_bytes, self._read_seconds)
        self._num_requests += 1
        try:
            self._check(scope)
            await self._app(scope, body.receive, guarded_send)
        except ApiError as error:
            if not started:
                await error_response(error)(scope, receive, guarded_send)
        except Exception:
            logger.exception("a request failed: %s %s", scope["method"], scope["path"])
            if not started:
                failure = ApiError(500, "something failed in the server", code="internal_error")
                await error_response(failure)(scope, receive, guarded_send)
        finally:
            self._num_requests -= 1

    def _check(self, scope: Scope) -> None:
        if self._num_requests > self._max_requests:
            raise too_many(self._max_requests)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)
        path: str = scope["path"]
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


class _Body:
    """The body of one request, as far as it may be read."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self._max_bytes, self._seconds = receive, max_bytes, seconds
        self._size, self._complete = 0, False

    async def receive(self) -> Message:
        if self._complete:  # what comes now is the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout(self._seconds):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._seconds:g} s", code="body_too_slow") from None
        self._size += len(message.get("body", b""))
        if self._size > self._max_bytes:
            raise too_large(self._max_bytes)
        self._complete = not message.get("more_body", False)
        return message
