"""Options of an engine: its memory, and how much it does at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How large and how much at once.

    Args:
        page_entries: entries of a page at one recursion.
        num_pages: pages of the pool. None: as many as `kv_memory_gib` holds.
        kv_memory_gib: memory of the pool. None: on CUDA `memory_share` of what is free once the model is loaded, on a
            CPU 1 GiB.
        memory_share: see `kv_memory_gib`.
        max_requests: requests that run at a time; others wait.
        max_visit_tokens: tokens that one planned visit applies the block to. None: 512 on a CPU, 8192 on CUDA, where
            they are tokens of prompts.
        prefill_chunk: tokens of a prompt that enter together. None: 256 on a CPU, 1024 on CUDA.
        slots: whether requests decode by themselves in slots of the device, batches of `slot_visits` visits at a time,
            instead of one planned visit after the other. None: on CUDA and where `native` is on, if the model can.
        slot_visits: see `slots`. More hide more of the host's work; tokens then come in larger pieces, and a slot whose
            request has ended is taken later. None: as few as hide that work, from measured times, and at most 8, or 16
            and 32 where more than 64 and 512 requests may run; 8 on a CPU. Where pages are few, a quarter of that.
        lockstep: whether slots end their tokens together, every R visits, instead of each as soon as it is through. The
            head and the unshared layers then run in one visit of R, but tokens of few recursions wait. None: if the
            model has no router, so that every token takes all recursions, and rows that wait cost something.
        native: whether layers of few rows are run by a C program, which the machine's compiler compiles once. None: on
            a CPU in float32, if there is a compiler.
        tokens_to_grow: when a request is admitted, every running one keeps room for so many tokens more.
            0 fills the pool to the brim, and preempts more often.
        max_length: tokens of a prompt and its output together. None: the model's own limit.
        prefix_caching: keep the keys and values of prompts for requests that begin alike.
        seed: of the seeds that requests without one get.
    """

    page_entries: int = 16
    num_pages: int | None = None
    kv_memory_gib: float | None = None
    memory_share: float = 0.85
    max_requests: int = 256
    max_visit_tokens: int | None = None
    prefill_chunk: int | None = None
    slots: bool | None = None
    slot_visits: int | None = None
    lockstep: bool | None = None
    native: bool | None = None
    tokens_to_grow: int = 32
    max_length: int | None = None
    prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("page_entries", "num_pages", "max_requests", "max_visit_tokens", "prefill_chunk", "slot_visits"):
            self._whole(name, 1)
        self._whole("tokens_to_grow", 0)
        self._whole("max_length", 2)
        if self.kv_memory_gib is not None and not 0 < self.kv_memory_gib < math.inf:
            raise ValueError(f"kv_memory_gib={self.kv_memory_gib} must be positive and finite")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share={self.memory_share} must lie in (0, 1]")

    def _whole(self, name: str, least: int) -> None:
        value: object = getattr(self, name)
        if value is None and getattr(type(self), name) is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
