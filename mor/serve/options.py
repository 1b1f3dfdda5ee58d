"""Options of a server: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where, who and how much.

    Args:
        model_name: what requests call the model.
        host, port: where to listen. Port 0: any that is free.
        api_key: what requests must bear; None lets everybody in.
        cors_origins: web pages of other origins that may ask; "*" is any.
        max_waiting: samples that may wait beyond those that run; more are refused with 429.
        max_body_bytes: of a request.
        max_tokens: that one sample may be asked to generate; None is what the model's length leaves.
        max_choices: samples of one request, prompts times n.
        max_connections: clients at a time; others get 503.
        max_unread: tokens of each choice, alternatives counted too, that a client may leave unread before it loses its
            request.
        read_seconds: that a client may take to send its request.
        write_seconds: that a client may take to accept something of what is written to it.
        drain_seconds: that open requests get after SIGTERM.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 1024
    max_body_bytes: int = 2**21
    max_tokens: int | None = None
    max_choices: int = 128
    max_connections: int = 4096
    max_unread: int = 8192
    read_seconds: float = 20.0
    write_seconds: float = 20.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0),
            ("max_waiting", 0),
            ("max_body_bytes", 1024),
            ("max_choices", 1),
            ("max_connections", 1),
            ("max_unread", 1),
            ("read_seconds", 0.05),
            ("write_seconds", 0.05),
            ("drain_seconds", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1, or None")
        if self.port > 65535:
            raise ValueError(f"port={self.port} must be at most 65535")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; give a key, or none to let everybody in")

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the server."""
        return not is_loopback(self.host)

    def may_ask(self, origin: str) -> bool:
        """Whether a web page of `origin` may ask. Without a key, a server that only this machine can reach trusts its
        pages alone: the name of another page's host can be made to lead here (DNS rebinding).
        """
        if self.api_key is not None or self.is_public or not {"*", origin}.isdisjoint(self.cors_origins):
            return True
        try:
            return is_loopback(urlsplit(origin).hostname or "")
        except ValueError:
            return False


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
