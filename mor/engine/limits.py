"""How much an engine does at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much at once.

    `max_requests`: requests that run. `max_visit_tokens`: tokens of a visit; a prefill chunk may exceed it if it is the
    only one in flight, so that a prompt never waits for other requests' outputs to end. `prefill_chunk`: tokens of a
    prompt that enter together; chunks end at multiples of it, whatever else runs. `max_length`: tokens of a prompt and
    its output. `max_waiting`: requests that wait, None for any number. `room_to_grow`: tokens of each running request
    for which pages must be left when another is admitted. Without any, a pool that is nearly full admits what it
    preempts a moment later.
    """

    max_requests: int
    max_visit_tokens: int
    prefill_chunk: int
    max_length: int
    max_waiting: int | None = None
    room_to_grow: int = 0

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_visit_tokens", "prefill_chunk", "max_waiting"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2: one token of prompt, one of output")
