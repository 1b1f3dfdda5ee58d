"""What the engine says about a request."""

from __future__ import annotations

from dataclasses import dataclass

from mor.engine.request import FinishReason


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
    top_logprobs: tuple[tuple[int, float], ...]
    depth: int


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """The state of a request.

    `prompt_tokens`: length of the prompt. `cached_tokens`: how many of them came from the prefix cache. `tokens`, and
    `text` with them: those since the last output when streaming, all when generating. `finish_reason`: None while
    running. `mean_depth`: the mean of all its tokens' depths so far, None when there are none. `error`: why the request
    failed, None when it did not.
    """

    id: str
    prompt_tokens: int
    cached_tokens: int
    tokens: tuple[TokenOutput, ...]
    text: str
    finished: bool
    finish_reason: FinishReason | None
    mean_depth: float | None
    error: str | None
