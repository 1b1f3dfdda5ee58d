"""A token as it is shown: its text, its recursion depth, and how probable the model found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def visible(text: str) -> str:
    """`text` with its line ends marked, so that a token that is nothing else can still carry a colour."""
    return text.replace("\n", "↵\n")


def subscript(depth: int) -> str:
    """`depth` in subscript digits."""
    return str(depth).translate(SUBSCRIPTS)


def mean_depth(views: Sequence[TokenView]) -> float:
    """Mean depth of the tokens, 0 for none."""
    return sum(view.depth for view in views) / len(views) if views else 0.0
