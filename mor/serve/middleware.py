"""What stands between a connection and the routes: the key, limits of size and time, headers, and counting."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.serve.errors import ApiError, forbidden_origin, too_large, too_many
from mor.serve.metrics import Metrics
from mor.serve.options import ServeOptions
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

    It adds the security headers, asks for the key (compared in constant time), turns foreign pages away, bounds how
    many requests there are, how large they are and how long they take to come, counts responses, and answers 500
    without a trace when something failed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        known_paths: frozenset[str],
        options: ServeOptions,
    ) -> None:
        self._app, self._metrics, self._known_paths, self._options = app, metrics, known_paths, options
        self._key = None if options.api_key is None else options.api_key.encode()
        self._num_requests = 0

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

        body = _Body(receive, self._options.max_body_bytes, self._options.read_seconds)
        self._num_requests += 1
        try:
            self._check(scope)
            await self._app(scope, body.receive, guarded_send)
        except ApiError as error:
            if not started:
                await error_response(error)(scope, receive, guarded_send)
        except Exception:
            logger.exception("a request failed: %s %r", scope["method"], scope["path"])
            if not started:
                failure = ApiError(500, "something failed in the server", code="internal_error")
                await error_response(failure)(scope, receive, guarded_send)
        finally:
            self._num_requests -= 1

    def _check(self, scope: Scope) -> None:
        if self._num_requests > self._options.max_connections:
            raise too_many(self._options.max_connections)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._options.max_body_bytes:
            raise too_large(self._options.max_body_bytes)
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not self._options.may_ask(origin):
            raise forbidden_origin(origin)
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
