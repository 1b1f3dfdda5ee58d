"""Where tests' engines come from. Nothing heavy is imported until one is opened."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.engine.engine import Engine

MAX_LENGTH = 256
CRASH, RAISE, HANG = "\x01", "\x02", "\x03"
"""Prompts that begin so kill the engine's process, make a visit fail, or make it hang."""


@dataclass(frozen=True, kw_only=True)
class TinySource:
    """`seconds`: that each visit takes at least. `unable`: what opening fails with, after `open_seconds`."""

    seconds: float = 0.0
    unable: str = ""
    open_seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Engine:
        time.sleep(self.open_seconds)
        if self.unable:
            raise ValueError(self.unable)
        from tests.serve.tiny_engine import make_engine

        return make_engine(self.seconds, **self.options)
