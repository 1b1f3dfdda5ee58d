"""A request and the runs of its tokens that travel through the block together."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from mor.engine.params import SamplingParams

State = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "abort", "error"]

Top = tuple[tuple[int, float], ...]
"""The most probable tokens with the natural logarithms of their probabilities."""

Lacks = list[tuple[int, int]]
"""Pages that a request lacks: (virtual sequence, how many)."""


class TokenScore(NamedTuple):
    """How probable a token of a prompt was after those before it.

    `logprob`: natural logarithm of its probability. `top`: the most probable tokens in its place. `depth`: block
    applications of the position that predicted it, which is that of the token before it.
    """

    logprob: float
    top: Top
    depth: int


@dataclass(kw_only=True, eq=False, slots=True)
class Request:
    """One sequence being generated (a call with n > 1 is n of these). Two requests are never equal.

    The caller gives `id`, `prompt`, `params` and `in_slot`; everything else is written by the scheduler alone.

    `output`: sampled tokens. `num_computed`: how many of the known tokens have all their keys and values; `depths`:
    block applications of each of these. `pages` and `lengths`: page ids and number of entries of each virtual sequence,
    those of the segment in flight included. `prefill`: tokens to compute before it decodes, as known when it was last
    admitted. `cached_tokens`: how many of them it found in the prefix cache when it was first admitted. `in_slot`:
    whether it decodes by itself in a slot of the device, instead of visit by visit. `most_output`: tokens after which
    it must be finished for its length; `most_computed`: tokens of it that are ever computed, which the last one that
    is sampled is not. `scores`: of the prompt's tokens
    after the first, if asked for, as far as they are known; they stay when the request starts again.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    in_slot: bool = False
    arrival: int = -1
    most_output: int = 0
    most_computed: int = 0
    output: list[int] = field(default_factory=list[int])
    depths: list[int] = field(default_factory=list[int])
    num_computed: int = 0
    pages: list[list[int]] = field(default_factory=list[list[int]])
    lengths: list[int] = field(default_factory=list[int])
    segment: Segment | None = None
    state: State = "waiting"
    finish_reason: FinishReason | None = None
    prefill: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    scores: list[TokenScore] = field(default_factory=list[TokenScore])

    @property
    def tokens(self) -> list[int]:
        """All known tokens: the prompt and the output so far."""
        return [*self.prompt, *self.output]

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_pages(self) -> int:
        return sum(map(len, self.pages))

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens that were known on admission are still to be computed."""
        return self.num_computed < self.prefill

    @property
    def is_scoring(self) -> bool:
        """Whether scores are asked for that are not known yet: the tokens that predict them must be computed."""
        return self.params.prompt_logprobs is not None and len(self.scores) < len(self.prompt) - 1

    @property
    def is_decoding_alone(self) -> bool:
        """Whether it is in a slot, or waits for one."""
        return self.in_slot and self.state == "running" and self.num_computed >= self.prefill

    @property
    def is_ready(self) -> bool:
        """Whether a segment may enter: admitted, nothing in flight, and something to compute in it."""
        left = self.num_known - self.in_slot - self.num_computed
        return self.state == "running" and self.segment is None and left > 0


@dataclass(kw_only=True, eq=False, slots=True)
class Segment:
    """Tokens `start` .. `start + count` of a request, on their way through the block.

    `recursion`: the next one to visit, 0-based; before 0 the segment enters (embedding, first layers). `active`: how
    many of its tokens take part in that visit, all of them when entering.
    """

    request: Request
    start: int
    count: int
    recursion: int = 0
    active: int = field(init=False)

    def __post_init__(self) -> None:
        self.active = self.count

    @property
    def entered(self) -> bool:
        return self.recursion > 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids."""
        stop, split = self.start + self.count, len(self.request.prompt)
        generated = islice(self.request.output, max(0, self.start - split), max(0, stop - split))
        return (*self.request.prompt[self.start : stop], *generated)

    @property
    def needs_head(self) -> bool:
        """Whether its last token is the last one known, so that the next one is to be sampled."""
        return self.start + self.count == self.request.num_known and self.request.params.generates

    @property
    def scoring(self) -> range:
        """Those of its tokens, by their numbers in the request, that predict tokens of the prompt to be scored."""
        if not self.request.is_scoring:
            return range(0)
        first, last = len(self.request.scores), len(self.request.prompt) - 1
        return range(max(self.start, first), min(self.start + self.count, last))


@dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """What one visit did to a segment.

    `added`: entries appended to each virtual sequence. `active`: tokens that take the next recursion; 0 when the
    segment is done, and then `depths` holds the block applications of each of its tokens, and `scores` what those that
    are `scoring` predict.
    """

    added: tuple[int, ...]
    active: int
    depths: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
