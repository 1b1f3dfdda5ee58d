"""Batches made ready in the background while the device computes."""

import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from mor.data.loader import Batch

DEPTH = 2


class Loader(Protocol):
    """Endless batches that can be left and entered again: what `PackedLoader` and `PrefetchLoader` are."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class PrefetchLoader:
    """The batches of `loader`, up to `depth` of them made ahead by a thread, which starts with the first batch.

    The state is that after the batch handed out last, whatever was made ahead, so resuming is as exact as without the
    thread. What `loader` raises is raised in place of the batch. For a CUDA `device`, batches are put into page-locked
    memory, from which copies to it need not be waited for. `loader` must not be used by others meanwhile.
    """

    def __init__(self, loader: Loader, *, depth: int = DEPTH, device: torch.device | None = None) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._loader = loader
        self._depth = depth
        self._device = device if device is not None and device.type == "cuda" else None
        self._state = loader.state_dict()
        self._stop: weakref.finalize | None = None
        self._ready: queue.Queue[_Made] = queue.Queue(depth)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        if self._stop is None:
            self._start()
        made = self._ready.get()
        if made.error is not None:
            self.close()
            raise made.error
        assert made.batch is not None
        self._state = made.state
        return made.batch

    def state_dict(self) -> dict[str, int]:
        """Where the batch handed out last ends."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly where `state` was taken. Raises ValueError as the loader does, and then changes nothing."""
        self.close()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """Stop the thread and forget what it made ahead; the next batch starts it again."""
        if self._stop is not None:
            self._stop()
            self._stop = None
            self._loader.load_state_dict(self._state)

    def _start(self) -> None:
        self._ready = queue.Queue(self._depth)
        stopped = threading.Event()
        arguments = (self._loader, self._ready, stopped, self._device)
        thread = threading.Thread(target=_make, args=arguments, name="prefetch", daemon=True)
        self._stop = weakref.finalize(self, _join, thread, self._ready, stopped)
        thread.start()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """A batch and the state after it, or the error that came instead."""

    batch: Batch | None = None
    state: dict[str, int] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None


def _make(loader: Loader, ready: "queue.Queue[_Made]", stopped: threading.Event, device: torch.device | None) -> None:
    """Fill `ready` until `stopped`. It does not know the `PrefetchLoader`, which may so be forgotten."""
    if device is not None and device.index is not None:
        torch.cuda.set_device(device)  # a new thread begins on the first device, and would take memory there
    while not stopped.is_set():
        try:
            batch = next(loader)
            made = _Made(batch=batch if device is None else _pinned(batch), state=loader.state_dict())
        except BaseException as error:  # it belongs to whoever asks for the batch
            made = _Made(error=error)
        ready.put(made)
        if made.error is not None:
            return


def _join(thread: threading.Thread, ready: "queue.Queue[_Made]", stopped: threading.Event) -> None:
    stopped.set()
    with contextlib.suppress(queue.Empty):  # a full queue would keep the thread waiting
        while True:
            ready.get_nowait()
    if thread is not threading.current_thread():
        thread.join()


def _pinned(batch: Batch) -> Batch:
    documents: Any = None if batch.document_ids is None else batch.document_ids.pin_memory()
    return dataclasses.replace(batch, input_ids=batch.input_ids.pin_memory(), document_ids=documents)
