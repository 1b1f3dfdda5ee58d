"""What the engine says about a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mor.engine.detokenizer import Detokenizer, TextPiece
from mor.engine.request import FinishReason, TokenScore, Top


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
    millisecond leaves no time for text that nobody reads. `text_maker`: makes what turns its tokens into text."""

    def __init__(self, text_maker: Callable[[], Detokenizer]) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self._text_maker, self._pieces, self._num_read = text_maker, list[TextPiece](), 0
        self._ended, self._last_is_hidden = False, False

    @cached_property
    def _by_token(self) -> Detokenizer:
        """The text token by token, as far as `_pieces` are made."""
        return self._text_maker()

    @cached_property
    def _in_runs(self) -> Detokenizer:
        """The text of the first `_num_read` tokens, of which single ones are not known."""
        return self._text_maker()

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self, ids: Sequence[int], depths: Sequence[int], logprobs: Sequence[float] = (), tops: Sequence[Top] = ()
    ) -> None:
        """Take in new tokens. `logprobs`, `tops`: none, or those of all tokens of the request."""
        self.ids += ids
        self.depths += depths
        if logprobs:
            self.logprobs += logprobs
            self.tops += tops

    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        self._write(len(self.ids))
        return self._by_token.stopped is not None

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
                logprob=self.logprobs[n] if self.logprobs else None,
                top_logprobs=self.tops[n] if self.tops else (),
                depth=self.depths[n],
            )
            for n in range(start, stop)
        )

    def text(self, start: int, stop: int) -> str:
        """The text of tokens `start`..`stop`: soonest for all of them, or run after run, without stop strings."""
        if start != self._num_read or len(self._pieces) >= stop:
            return "".join(token.text for token in self.tokens(start, stop))
        self._num_read, is_end = stop, self._ended and stop == len(self.ids)
        text = self._in_runs.feed_all(self.ids[start : stop - (is_end and self._last_is_hidden)])
        return text + self._in_runs.finish() if is_end else text

    def _write(self, stop: int) -> None:
        """Make the text of the tokens before `stop`. What was held back comes with the last one."""
        for n in range(len(self._pieces), stop):
            is_last = self._ended and n == len(self.ids) - 1
            hidden = is_last and self._last_is_hidden
            piece = TextPiece("", self._by_token.offset) if hidden else self._by_token.feed(self.ids[n])
            self._pieces.append(piece)
        if self._ended and stop == len(self.ids) and stop:
            self._pieces[-1] = TextPiece(self._pieces[-1].text + self._by_token.finish(), self._pieces[-1].offset)


@dataclass(kw_only=True, eq=False, slots=True)
class RequestOutput:
    """The state of a request.

    `prompt_tokens`: length of the prompt. `cached_tokens`: how many of them came from the prefix cache. `token_ids`,
    `depths`, `tokens` and `text`: those since the last output when streaming, all when generating; the last two are
    made when they are read. `finish_reason`: None while running. `error`: why the request failed, None when it did not.
    `prompt_scores`: how probable the tokens of the prompt after the first were, all of them unless the request failed;
    None when not asked for.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    start: int
    stop: int
    finish_reason: FinishReason | None
    error: str | None
    prompt_scores: Sequence[TokenScore] | None = field(repr=False)
    log: TokenLog = field(repr=False)
    _tokens: tuple[TokenOutput, ...] | None = field(init=False, repr=False, default=None)
    _text: str | None = field(init=False, repr=False, default=None)

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of the tokens."""
        return self.log.ids[self.start : self.stop]

    @property
    def depths(self) -> Sequence[int]:
        """Depths of the tokens."""
        return self.log.depths[self.start : self.stop]

    @property
    def mean_depth(self) -> float | None:
        """Mean depth of all tokens so far, None when there are none."""
        return sum(self.log.depths[: self.stop]) / self.stop if self.stop else None

    @property
    def prompt_logprobs(self) -> list[float | None]:
        """Log-probabilities of the prompt's tokens, if asked for; nothing comes before the first, so it has None."""
        return [] if self.prompt_scores is None else [None, *(score.logprob for score in self.prompt_scores)]

    @property
    def prompt_tops(self) -> list[Top]:
        """The most probable tokens in the place of each token of the prompt, if asked for; none for the first."""
        return [] if self.prompt_scores is None else [(), *(score.top for score in self.prompt_scores)]

    @property
    def prompt_depths(self) -> list[int | None]:
        """Depths of the positions that predicted the prompt's tokens, if these are scored; None for the first."""
        return [] if self.prompt_scores is None else [None, *(score.depth for score in self.prompt_scores)]

    @property
    def has_logprobs(self) -> bool:
        """Whether the tokens come with log-probabilities."""
        return self.start < self.stop and bool(self.log.logprobs)

    @property
    def tokens(self) -> tuple[TokenOutput, ...]:
        """The tokens with all that is known of them."""
        if self._tokens is None:
            self._tokens = self.log.tokens(self.start, self.stop)
        return self._tokens

    @property
    def text(self) -> str:
        """Their text."""
        if self._text is None:
            self._text = self.log.text(self.start, self.stop)
        return self._text
