"""A prompt as token ids."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

Prompt = str | Sequence[int]


def prompt_ids(prompt: Prompt, tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """The ids of a text or of tokens. Raises ValueError naming what is not one, or not among `vocabulary` ids."""
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            half = f"half of a character, {prompt[error.start]!r} at {error.start}"
            raise ValueError(f"the prompt has {half}, which has no bytes; remove it") from None
        tokens: Sequence[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        tokens = prompt
    try:
        ids = tuple(map(operator.index, tokens))
    except TypeError:
        raise ValueError(f"the prompt {reprlib.repr(prompt)} must be a text or a sequence of token ids") from None
    check_ids(ids, vocabulary)
    return ids


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raises ValueError naming the first that is not among `vocabulary` ids."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"the prompt has token {wrong}, which is outside the vocabulary 0..{vocabulary - 1}")
