"""A token as it is shown: its text, its recursion depth, and how probable the model found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNFINISHED = "\ufffd"
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One token of a text.

    `text`: the characters it completes (empty inside a character of several tokens). `depth`: block applications it
    took, from 1. `probability`: what the model gave it after its prefix, None for the first. `from_prompt`: given, not
    generated.
    """

    text: str
    depth: int
    probability: float | None = None
    from_prompt: bool = False


class PieceDecoder:
    """Turns token ids into text one by one; a character split over several tokens appears with its last one.

    Decoding starts again from the last token boundary that was a character boundary, so a long text costs no more per
    token than a short one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that `token_id` adds; empty while a character is incomplete."""
        self._pending.append(token_id)
        text = self._difference()
        if text.endswith(UNFINISHED) and len(self._pending) < 8:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left when the text ends inside a character."""
        text = self._difference() if self._pending else ""
        self._context, self._pending = self._pending, []
        return text

    def _difference(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """`text` with its line ends marked, so that a token that is nothing else can still carry a colour."""
    return text.replace("\n", "↵\n")


def subscript(depth: int) -> str:
    """`depth` in subscript digits."""
    return str(depth).translate(SUBSCRIPTS)


def mean_depth(views: Sequence[TokenView]) -> float:
    """Mean depth of the tokens, 0 for none."""
    return sum(view.depth for view in views) / len(views) if views else 0.0
