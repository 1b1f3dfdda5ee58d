"""The text and the bytes of single tokens, as log-probabilities name them."""

from __future__ import annotations

import re
from typing import Any


class Vocabulary:
    """Texts of single tokens of a Hugging Face fast tokenizer.

    A token that is part of a character has no text of its own; it is called `bytes:\\xe2\\x82`, as OpenAI does, so that
    no two tokens share a name.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = _byte_characters() if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else {}
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """A name for `token`: its text wherever it has one."""
        return self._look_up(token)[0]

    def bytes(self, token: int) -> list[int]:
        """The token's bytes in UTF-8."""
        return list(self._look_up(token)[1])

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            raw = self._raw(token)
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token] = name, raw
        return self._known[token]

    def _raw(self, token: int) -> bytes:
        written: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:  # an id that the model has and the tokenizer has not
            return b""
        if self._bytes_of and all(character in self._bytes_of for character in written):
            return bytes(self._bytes_of[character] for character in written)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", written):
            return bytes.fromhex(match[1])
        if "\u2581" in written:  # SentencePiece's space
            return written.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()


def _byte_characters() -> dict[str, int]:
    """The byte that each character stands for in byte-level BPE: itself where it can be seen, the rest from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
