"""The text of one request as its tokens come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mor.data.pieces import PieceDecoder


@dataclass(frozen=True)
class TextPiece:
    """Text that may be shown. `offset`: characters of the request's text before it."""

    text: str
    offset: int


class Detokenizer:
    """Turns the tokens of one request into text; the pieces in their order are the request's text.

    Held back is what could still change: a character whose tokens are incomplete, and characters that a stop string
    may begin with. The text ends before the stop string whose last character comes first (of two that end together,
    the longer), so it does not depend on how the text is split into tokens.

    `prompt`: tokens before the first, whose text is not given. `min_tokens`: no stop string is looked for in the text
    of the tokens before this many, which is never held back for one. `skip_special_tokens`: the end of a document and
    its like have no text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        *,
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        if not all(stop):
            raise ValueError(f"stop={stop!r} holds an empty string; leave it out")
        self._decoder = PieceDecoder(tokenizer, prompt=prompt, skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._tokens_before_stop = min_tokens
        self._held = ""
        self._offset = 0
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._stopped

    @property
    def offset(self) -> int:
        """Characters of text let go of so far."""
        return self._offset

    def feed(self, token: int) -> TextPiece:
        """The text that may be shown after `token`: none after a stop string."""
        self._tokens_before_stop -= 1
        return self._release("" if self.stopped else self._decoder.feed(token))

    def feed_all(self, tokens: Sequence[int]) -> str:
        """The text of what `feed` gives for these tokens one after the other, sooner where there is no stop string."""
        if self._stop:
            return "".join(self.feed(token).text for token in tokens)
        text = self._decoder.feed_all(tokens)
        self._offset += len(text)
        return text

    def finish(self) -> str:
        """The text held back, when no more tokens come; none after a stop string. It follows the last piece."""
        text = self._release("" if self.stopped else self._decoder.flush()).text
        held, self._held = self._held, ""
        self._offset += len(held)
        return text + held

    def _release(self, text: str) -> TextPiece:
        """Add `text` to what is held back and let go of what is certain."""
        text, self._held = self._held + text, ""
        if self._tokens_before_stop <= 0:
            text, self._held = self._cut(text)
        piece = TextPiece(text, self._offset)
        self._offset += len(text)
        return piece

    def _cut(self, text: str) -> tuple[str, str]:
        """`text` up to a stop string, or up to what may begin one; and the latter."""
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self._stopped = min(found)
            return text[: end - len(self._stopped)], ""
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - held], text[len(text) - held :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
