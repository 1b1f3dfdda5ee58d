"""From the engine's tokens to the JSON of a response: whole, or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mor.engine.request import TokenScore
from mor.serve.messages import News, Token
from mor.serve.stream import Piece
from mor.serve.vocabulary import Vocabulary

Json = dict[str, Any]

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON in ASCII, so that no text can break it, lone surrogates included."""


@dataclass(kw_only=True)
class Part:
    """Text and tokens of a choice: all of them, or what is new. `scores`: of its prompt's tokens after the first."""

    text: str = ""
    depths: list[int] = field(default_factory=list[int])
    tokens: list[Token] = field(default_factory=list[Token])
    finish_reason: str | None = None
    scores: list[TokenScore] = field(default_factory=list[TokenScore])

    def add(self, news: News) -> None:
        self.text += news.text
        self.depths += news.depths
        self.tokens += news.tokens
        self.finish_reason = news.finish_reason
        self.scores += news.scores


class Tally:
    """What a request used so far. `prompt_tokens`: of all its prompts."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._depths = 0
        self._cached: dict[int, int] = {}  # of each choice; those of one prompt share it

    def add(self, piece: Piece, samples_per_prompt: int) -> None:
        """Count what is new."""
        news = piece.news
        self.completion_tokens += len(news.depths)
        self._depths += sum(news.depths)
        self._cached.setdefault(piece.choice // samples_per_prompt, news.cached_tokens)

    def usage(self) -> Json:
        """As `replies.Usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "mean_depth": self._depths / self.completion_tokens if self.completion_tokens else None,
        }


class Shape(Protocol):
    """How one kind of response is written."""

    prefix: str
    whole_object: str
    chunk_object: str

    def first_chunk(self, index: int) -> Json | None:
        """The choice of the chunk that comes before any token, if there is one."""
        ...

    def choice(self, index: int, part: Part) -> Json: ...

    def chunk_choice(self, index: int, part: Part) -> Json: ...


class Writer:
    """Writes one response.

    `usage_at_end`: a last chunk without choices tells the usage; `usage_always`: every chunk does.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        model: str,
        prompt_tokens: int,
        num_choices: int,
        samples_per_prompt: int,
        usage_at_end: bool = False,
        usage_always: bool = False,
    ) -> None:
        self._shape, self._num_choices, self._samples_per_prompt = shape, num_choices, samples_per_prompt
        self._usage_at_end, self._usage_always = usage_at_end, usage_always
        self._head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._chunk_head = encode(self._head | {"object": shape.chunk_object})[:-1]
        self.tally = Tally(prompt_tokens)

    def first_events(self) -> str:
        """What comes before any token, as server-sent events."""
        firsts = [self._shape.first_chunk(index) for index in range(self._num_choices)]
        return "".join(self._event([choice]) for choice in firsts if choice is not None)

    def events(self, pieces: Iterable[Piece]) -> str:
        """News, one event for each choice that has any."""
        parts = self._gather(pieces)
        return "".join(self._event([self._shape.chunk_choice(index, part)]) for index, part in parts.items())

    def last_events(self) -> str:
        """What comes after all tokens."""
        return (self._event([], with_usage=True) if self._usage_at_end else "") + "data: [DONE]\n\n"

    def whole(self, pieces: Iterable[Piece]) -> Json:
        """The response that holds everything."""
        parts = self._gather(pieces)
        choices = [self._shape.choice(index, parts.get(index, Part())) for index in range(self._num_choices)]
        return self._head | {
            "object": self._shape.whole_object,
            "choices": choices,
            "usage": self.tally.usage(),
        }

    def _gather(self, pieces: Iterable[Piece]) -> dict[int, Part]:
        parts: dict[int, Part] = {}
        for piece in pieces:
            self.tally.add(piece, self._samples_per_prompt)
            parts.setdefault(piece.choice, Part()).add(piece.news)
        return parts

    def _event(self, choices: list[Json], *, with_usage: bool = False) -> str:
        usage = ',"usage":null' if self._usage_at_end else ""
        if with_usage or self._usage_always:
            usage = f',"usage":{encode(self.tally.usage())}'
        return f'data: {self._chunk_head},"choices":{encode(choices)}{usage}}}\n\n'


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt to be repeated before its completion."""

    text: str
    tokens: tuple[int, ...]
    offsets: tuple[int, ...]


class CompletionShape:
    """`/v1/completions`. `echoes`: one for each prompt, or none at all."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, vocabulary: Vocabulary, *, with_logprobs: bool, samples_per_prompt: int, echoes: Sequence[Echo] = ()
    ) -> None:
        self._vocabulary, self._with_logprobs = vocabulary, with_logprobs
        self._samples_per_prompt, self._echoes = samples_per_prompt, echoes

    def first_chunk(self, index: int) -> Json | None:
        return None

    def chunk_choice(self, index: int, part: Part) -> Json:
        return {
            "index": index,
            "text": part.text,
            "logprobs": self._logprobs(part.tokens) if self._with_logprobs else None,
            "finish_reason": part.finish_reason,
            "depths": part.depths,
        }

    def choice(self, index: int, part: Part) -> Json:
        choice = self.chunk_choice(index, part)
        if self._echoes:
            self._put_before(choice, self._echoes[index // self._samples_per_prompt], part.scores)
        return choice

    def _logprobs(self, tokens: Sequence[Token]) -> Json:
        name = self._vocabulary.text
        return {
            "tokens": [name(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token.token, token.logprob, token.top_logprobs) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The most probable tokens, and the one that stands there."""
        name = self._vocabulary.text
        return {name(other): value for other, value in top} | {name(token): logprob}

    def _put_before(self, choice: Json, echo: Echo, scores: Sequence[TokenScore]) -> None:
        """Lay the prompt before its completion."""
        choice["text"] = echo.text + choice["text"]
        choice["finish_reason"] = choice["finish_reason"] or "length"
        if not self._with_logprobs:
            choice["depths"] = [None] * len(echo.tokens) + choice["depths"]
            return
        name, after, size = self._vocabulary.text, choice["logprobs"], len(echo.text)
        choice["depths"] = [None, *(score.depth for score in scores), *choice["depths"]]
        choice["logprobs"] = {
            "tokens": [*map(name, echo.tokens), *after["tokens"]],
            "token_logprobs": [None, *(score.logprob for score in scores), *after["token_logprobs"]],
            "top_logprobs": [
                None,
                *(self._top(t, score.logprob, score.top) for t, score in zip(echo.tokens[1:], scores, strict=True)),
                *after["top_logprobs"],
            ],
            "text_offset": [*echo.offsets, *(size + offset for offset in after["text_offset"])],
        }


class ChatShape:
    """`/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary, *, with_logprobs: bool) -> None:
        self._vocabulary, self._with_logprobs = vocabulary, with_logprobs

    def first_chunk(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "depths": []}

    def chunk_choice(self, index: int, part: Part) -> Json:
        return {"index": index, "delta": {"content": part.text}, **self._rest(part)}

    def choice(self, index: int, part: Part) -> Json:
        return {"index": index, "message": {"role": "assistant", "content": part.text}, **self._rest(part)}

    def _rest(self, part: Part) -> Json:
        logprobs = {"content": [self._token(token) for token in part.tokens]} if self._with_logprobs else None
        return {"logprobs": logprobs, "finish_reason": part.finish_reason, "depths": part.depths}

    def _token(self, token: Token) -> Json:
        assert token.logprob is not None
        tops = [self._named(top, logprob) for top, logprob in token.top_logprobs]
        return {
            **self._named(token.token, token.logprob),
            "top_logprobs": tops,
            "depth": token.depth,
            "text_offset": token.offset,
        }

    def _named(self, token: int, logprob: float) -> Json:
        return {"token": self._vocabulary.text(token), "logprob": logprob, "bytes": self._vocabulary.bytes(token)}
