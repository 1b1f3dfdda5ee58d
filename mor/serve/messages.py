"""What the server and its engine's process say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mor.engine.params import SamplingParams
from mor.engine.request import FinishReason, TokenScore


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Generate `params.n` samples after `prompt`. Answered by `Accepted` or `Refused`."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Abort:
    """End what was submitted as `id`, at once and without an answer."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End the process."""


ToEngine = Submit | Abort | Stop


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the server must know of the model.

    `max_length`: tokens of a prompt and its output. `has_dial`: whether requests may ask for a mean depth.
    `kv_bytes`: bytes of keys and values of one token of depth 1, 2, ... `num_pages`: of the pool.
    """

    vocab_size: int
    max_length: int
    num_recursions: int
    has_dial: bool
    mean_depth: float | None
    kv_bytes: tuple[int, ...]
    num_pages: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The model is loaded."""

    facts: ModelFacts


@dataclass(frozen=True, kw_only=True)
class Unable:
    """The model could not be loaded; the process ends. `reason`: for whoever started the server."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """`id` is queued; its samples are called `samples` in `Progress`."""

    id: str
    samples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """`id` cannot be served."""

    id: str
    reason: str


class Token(NamedTuple):
    """A generated token as log-probabilities tell of it, otherwise as `mor.engine.outputs.TokenOutput` describes it."""

    token: int
    offset: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    depth: int


class News(NamedTuple):
    """What is new of the sample `id`: text, and the depth of each new token. (Tuples of plain values travel fastest.)

    `tokens`: as many, where log-probabilities are asked for, else none. `error`: why it failed, for the log. `scores`:
    of the prompt's tokens after the first, with the first news, if they are asked for.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    text: str
    depths: tuple[int, ...]
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    error: str | None
    scores: tuple[TokenScore, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the engine is, and its counts since it began."""

    running: int
    waiting: int
    pages_free: int
    visits: int
    rows: int
    preemptions: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a visit brought."""

    news: tuple[News, ...]
    load: Load


FromEngine = Ready | Unable | Accepted | Refused | Progress
