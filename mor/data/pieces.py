"""Token ids to text, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, so also the most tokens that can share one."""


class PieceDecoder:
    """Turns token ids into text one by one; a character split over several tokens appears with its last one.

    Only a window of the last tokens is decoded, so a long text costs no more per token than a short one.

    `prompt`: tokens before the first. Their text is not given, but some tokenizers write a word differently (without
    the space before it) at the very beginning. `skip_special_tokens`: the ends of documents and their like have no
    text.
    """

    def __init__(self, tokenizer: Any, *, prompt: Sequence[int] = (), skip_special_tokens: bool = False) -> None:
        # What stands around a fast tokenizer's own `decode` takes twice as long as it.
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window, self._text = self._last_characters(prompt)
        self._shown = len(self._text)  # characters of the window's text that were given
        self._waiting = 0  # tokens since the text last ended with a whole character

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        before, self._text = self._text, self._decode([*self._window, token_id])
        whole = not self._text.endswith(UNFINISHED)
        self._waiting = 0 if whole else self._waiting + 1
        if whole and self._text and self._text == before:
            return ""  # a token without text must not push those with text out of the window
        self._window.append(token_id)
        piece = self._give(self._num_certain())
        if len(self._window) >= (4 if whole else 8) * LONGEST_CHARACTER:
            self._shorten()
        return piece

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """What `feed` gives for these tokens one after the other, in little more time than for one of them."""
        window = [*self._window, *token_ids]
        text = self._decode(window)
        window, kept = self._last_characters(window) if len(window) >= 4 * LONGEST_CHARACTER else (window, text)
        if self._waiting or text.endswith(UNFINISHED) or not kept:
            return "".join(map(self.feed, token_ids))
        piece = text[self._shown :]
        self._window, self._text, self._shown = window, kept, len(kept)
        return piece

    def flush(self) -> str:
        """What is left when the text ends inside a character."""
        return self._give(len(self._text))

    def _num_certain(self) -> int:
        """Characters of the window's text that further tokens cannot change."""
        if self._waiting < LONGEST_CHARACTER:
            return len(self._text.rstrip(UNFINISHED)) if self._waiting else len(self._text)
        return len(self._text) - 1

    def _give(self, end: int) -> str:
        """The window's text up to `end`, less what was given already."""
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _shorten(self) -> None:
        """Keep the last tokens of the window."""
        held_back = len(self._text) - self._shown
        self._window, self._text = self._last_characters(self._window)
        self._shown = max(0, len(self._text) - held_back)

    def _last_characters(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """A few of the last tokens, from the beginning of a character if there is one, and their text."""
        for size in range(LONGEST_CHARACTER, 2 * LONGEST_CHARACTER):
            tail = list(token_ids[-size:])
            text = self._decode(tail)
            if not text.startswith(UNFINISHED):
                return tail, text
        tail = list(token_ids[-LONGEST_CHARACTER:])
        return tail, self._decode(tail)

    def _decode(self, token_ids: list[int]) -> str:
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
