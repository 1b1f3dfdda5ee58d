"""Planned visits beside the slots' batches: on CUDA a stream of their own, elsewhere nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Work that waits for the host, on a stream on which it does not make the slots wait. Its kernels come before
    theirs where both could run: they are few, and the host waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def join(self) -> None:
        """Let the slots see what was done beside them."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def start(self, *, after_slots: bool) -> None:
        """Begin anew; `after_slots` once what the slots have queued is done."""
        if self._stream is not None and after_slots:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work queued here is beside the slots."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
