"""Errors as OpenAI's interface shapes them. Their texts are for the client: no paths, no traces."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]

_TYPES: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong; `param`: the field of the request that did it."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error. `retry_after`: seconds after which to try again. `allow`: methods that are served."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.allow = allow
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        headers |= {} if self.allow is None else {"Allow": self.allow}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def named_field(message: str) -> str | None:
    """The field that a message begins with, as `temperature=-1 must be ...` does."""
    match = re.match(r"(\w+)=", message)
    return match[1] if match else None


def unsupported(param: str, instead: str = "leave it out") -> ApiError:
    """A field of OpenAI's that this server does not serve; it is never ignored."""
    return ApiError(400, f"{param} is not supported; {instead}", param=param, code="unsupported_parameter")


def too_large(limit: int) -> ApiError:
    """The body exceeds the limit."""
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def forbidden_origin(origin: str) -> ApiError:
    """A web page of elsewhere asks."""
    message = f"pages of {origin[:200]!r} may not ask this server; --cors-origin lets them, an API key lets any"
    return ApiError(403, message, code="origin_not_allowed")


def overloaded(limit: int) -> ApiError:
    """As many samples are under way as may be."""
    message = f"{limit} samples are running or waiting, which is as many as may; try again later"
    return ApiError(429, message, code="queue_full", retry_after=1)


def too_many(limit: int) -> ApiError:
    """As many requests are open as may be."""
    return ApiError(503, f"{limit} requests are open, which is as many as may be", code="too_many", retry_after=1)


def unavailable(state: str, retry_after: int = 5) -> ApiError:
    """The engine cannot answer now."""
    return ApiError(503, f"the engine is {state}; try again later", code="unavailable", retry_after=retry_after)


def engine_lost() -> ApiError:
    """The engine's process ended while it worked on the request."""
    return ApiError(503, "the engine stopped while it worked on this request", code="engine_lost", retry_after=5)


def engine_failed() -> ApiError:
    """The engine gave up on this request alone."""
    return ApiError(500, "the engine failed on this request", code="engine_failed")


def slow_reader(limit: int) -> ApiError:
    """The client does not read what it asked for."""
    return ApiError(408, f"more than {limit} tokens were left unread; the request was ended", code="slow_reader")
