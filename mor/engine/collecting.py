"""When Python looks for garbage that refers to itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_later() -> Iterator[None]:
    """Let no collection begin inside; what there is to collect is found afterwards.

    A step with a thousand requests makes so many objects that Python would collect again and again in it, now and then
    through all that was ever imported, while the device waits.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
