"""What a caller asks of one generation: length, sampling, stopping and the depth to spend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import cast

Budget = tuple[float | None, int | None]
MOST_SAMPLES = 65536
"""Of one prompt."""

MOST_BUDGETS = 1024
"""Of which something is kept: whoever makes requests chooses them, and they are as many as there are numbers."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. Raises ValueError naming the field, its value and what would be right.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `stop`: strings that end the text (one string
    is accepted). `logprobs`: None for none, 0 for the chosen token's, k for the k most probable ones' too.
    `prompt_logprobs`: the same of the prompt's tokens; `max_tokens` may then be 0.
    `mean_depth`: block applications per token to aim at, between 1 and the model's recursions; None is the model's
    default. `max_recursions`: no token takes more. `n`: samples per prompt; their seeds are `seed`, `seed + 1`, ...
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    mean_depth: float | None = None
    max_recursions: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple(self.stop_token_ids))
        self._check_lengths()
        self._check_sampling()
        self._check_stops()
        self._check_depth()

    def _check_lengths(self) -> None:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens=0 must be at least 1, or come with prompt_logprobs")
        self._whole("max_tokens", 0)
        self._whole("min_tokens", 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        self._whole("n", 1)
        if self.n > MOST_SAMPLES:
            raise ValueError(f"n={self.n} must be at most {MOST_SAMPLES}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n={self.n} with temperature=0 gives {self.n} equal outputs; use n=1 or a temperature")

    def _check_sampling(self) -> None:
        self._number("temperature", lambda value: value >= 0, "of 0 (greedy) or more")
        self._whole("top_k", 0)
        self._number("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1 (off)")
        self._number("min_p", lambda value: 0 <= value <= 1, "between 0 (off) and 1")
        self._number("repetition_penalty", lambda value: value > 0, "above 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, lambda value: -2 <= value <= 2, "between -2 and 2 (0 is off)")
        self._whole("seed", 0, optional=True)
        self._whole("logprobs", 0, optional=True)
        self._whole("prompt_logprobs", 0, optional=True)

    def _check_stops(self) -> None:
        if not _all_of(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop={self.stop!r} must be strings that are not empty")
        if not _all_of(self.stop_token_ids, int) or any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} must be token ids of 0 or more")
        if not isinstance(self.ignore_eos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")

    def _check_depth(self) -> None:
        if self.mean_depth is not None:
            self._number("mean_depth", lambda value: value >= 1, "between 1 and the model's recursions, or None")
        self._whole("max_recursions", 1, optional=True)

    def _whole(self, name: str, least: int, *, optional: bool = False) -> None:
        value: object = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{', or None' * optional}")

    def _number(self, name: str, holds: Callable[[float], bool], right: str) -> None:
        value: float = getattr(self, name)
        if not _is_number(value) or not holds(value):
            raise ValueError(f"{name}={value!r} must be a number {right}")

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError for stop tokens that a vocabulary of `size` does not have."""
        wrong = next((token for token in self.stop_token_ids if token >= size), None)
        if wrong is not None:
            raise ValueError(f"stop_token_ids={self.stop_token_ids} has {wrong}, outside the vocabulary 0..{size - 1}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def generates(self) -> bool:
        """Whether tokens are to come; otherwise the prompt is scored, and that is all."""
        return self.max_tokens > 0

    @property
    def budget(self) -> Budget:
        """What decides the depths of given tokens: prefixes are shared between requests of one budget only."""
        return self.mean_depth, self.max_recursions


def _is_number(value: object) -> bool:
    """Whether a float can hold it; neither infinity nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(cast(float, value)) <= sys.float_info.max


def _tuple(values: object) -> object:
    """Values as a tuple; what is none as it is."""
    return tuple(cast(Iterable[object], values)) if isinstance(values, Iterable) else values


def _all_of(values: object, kind: type) -> bool:
    if not isinstance(values, tuple):
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in cast(Iterable[object], values))
