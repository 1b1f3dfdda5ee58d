"""Chats as text, and text as tokens: the only place that uses the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mor.data.pieces import PieceDecoder
from mor.serve.errors import invalid
from mor.serve.protocol import Message
from mor.serve.vocabulary import Vocabulary

Given = TypeVar("Given")
Made = TypeVar("Made")


class TextCoder:
    """Encodes and decodes in one thread of its own: long texts take a while, and a tokenizer serves one at a time.

    `template`: a chat template in Jinja, in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, *, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.vocabulary = Vocabulary(tokenizer)

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._template or self._tokenizer.chat_template)

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`. An empty text stands for the beginning of a document. Raises ApiError if the tokenizer
        has no token for that.
        """
        return await self._run(self._encode, text)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat and the beginning of the answer. Raises ApiError for one that the template refuses."""
        return await self._run(self._encode_chat, [turn.given for turn in messages])

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return await self._run(self._decode, list(tokens))

    async def pieces(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """The text of token ids, special ones included, and where each token begins in it."""
        return await self._run(self._pieces, tokens)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[Given], Made], given: Given) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, given)

    def _encode(self, text: str) -> list[int]:
        if text:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._tokenizer.eos_token_id is None:
            raise invalid("the prompt is empty; give some text", "prompt")
        return [self._tokenizer.eos_token_id]

    def _decode(self, tokens: list[int]) -> str:
        size = len(self._tokenizer)
        wrong = next((token for token in tokens if token >= size), None)
        if wrong is not None:
            raise invalid(f"tokens: {wrong} is outside the vocabulary 0..{size - 1}", "tokens")
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _pieces(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        decoder, text, offsets = PieceDecoder(self._tokenizer), "", list[int]()
        for token in tokens:
            offsets.append(len(text))
            text += decoder.feed(token)
        return text + decoder.flush(), offsets

    def _encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        if not self.has_chat:
            raise invalid(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                "messages",
                code="no_chat_template",
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise invalid(f"messages: the chat template refuses them: {error}", "messages") from None
        return self._encode(text)


def open_tokenizer(path: str | Path) -> Any:
    """The tokenizer of the model at `path`, without the model. Raises FileNotFoundError or ValueError."""
    from mor.data.tokenizer import load_tokenizer
    from mor.loading import find_model, tokenizer_place

    return load_tokenizer(tokenizer_place(find_model(path)))


def read_template(path: str | Path) -> str:
    """A chat template from a file. Raises OSError, or ValueError when it is not Jinja."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = Path(path).read_text(encoding="utf-8")
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{path} is not a chat template: line {error.lineno}: {error.message}") from None
    return text
