"""What the engine says about a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mor.engine.detokenizer import Detokenizer, TextPiece
from mor.engine.request import FinishReason

Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """One generated token.

    `text`: the characters that could be shown when it came, which may be none (inside a character, or where a stop
    string may begin) or include some of tokens before it. `offset`: where `text` begins in the request's text, in
    characters. `logprob`: natural logarithm of the probability the model gave the token, before penalties, temperature
    and filters; None when not asked for. `top_logprobs`: the most probable tokens with theirs. `depth`: block
    applications of the position that predicted the token: of the token before it, the last of the prompt for the first.
    """

    token: int
    text: str
    offset: int
    logprob: float | None
    top_logprobs: Top
    depth: int


class TokenLog:
    """All tokens of one request so far. Their text is made when somebody asks for it: decoding thousands of tokens in a
    millisecond leaves no time for text that nobody reads."""

    def __init__(self, text: Detokenizer) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.logprobs: list[float | None] = []
        self.tops: list[Top] = []
        self._text, self._pieces = text, list[TextPiece]()
        self._ended, self._last_is_hidden, self._depth_sum = False, False, 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self, ids: Sequence[int], depths: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top]
    ) -> None:
        """Take in new tokens."""
        self.ids += ids
        self.depths += depths
        self.logprobs += logprobs
        self.tops += tops
        self._depth_sum += sum(depths)

    @property
    def mean_depth(self) -> float | None:
        """Mean of all depths, None when there are none."""
        return self._depth_sum / len(self.depths) if self.depths else None

    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        self._write(len(self.ids))
        return self._text.stopped is not None

    def end(self, *, hide_last: bool) -> None:
        """No more tokens come. `hide_last`: the last one ended the text and is not part of it."""
        self._ended, self._last_is_hidden = True, hide_last

    def tokens(self, start: int, stop: int) -> tuple[TokenOutput, ...]:
        """Tokens `start`..`stop` with their text."""
        self._write(stop)
        return tuple(
            TokenOutput(
                token=self.ids[n],
                text=self._pieces[n].text,
                offset=self._pieces[n].offset,
                logprob=self.logprobs[n],
                top_logprobs=self.tops[n],
                depth=self.depths[n],
            )
            for n in range(start, stop)
        )

    def _write(self, stop: int) -> None:
        """Make the text of the tokens before `stop`. What was held back comes with the last one."""
        for n in range(len(self._pieces), stop):
            is_last = self._ended and n == len(self.ids) - 1
            hidden = is_last and self._last_is_hidden
            piece = TextPiece("", self._text.offset) if hidden else self._text.feed(self.ids[n])
            self._pieces.append(piece)
        if self._ended and stop == len(self.ids) and stop:
            self._pieces[-1] = TextPiece(self._pieces[-1].text + self._text.finish(), self._pieces[-1].offset)


@dataclass(kw_only=True, eq=False)
class RequestOutput:
    """The state of a request.

    `prompt_tokens`: length of the prompt. `cached_tokens`: how many of them came from the prefix cache. `token_ids`,
    `depths`, `tokens` and `text`: those since the last output when streaming, all when generating; the last two are
    made when they are read. `finish_reason`: None while running. `mean_depth`: the mean of all its tokens' depths so
    far, None when there are none. `error`: why the request failed, None when it did not.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    start: int
    stop: int
    finished: bool
    finish_reason: FinishReason | None
    mean_depth: float | None
    error: str | None
    log: TokenLog = field(repr=False)

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of the tokens."""
        return self.log.ids[self.start : self.stop]

    @property
    def depths(self) -> Sequence[int]:
        """Depths of the tokens."""
        return self.log.depths[self.start : self.stop]

    @cached_property
    def tokens(self) -> tuple[TokenOutput, ...]:
        """The tokens with all that is known of them."""
        return self.log.tokens(self.start, self.stop)

    @cached_property
    def text(self) -> str:
        """Their text."""
        return "".join(token.text for token in self.tokens)
