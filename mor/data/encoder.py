"""Documents to token ids, in batches."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mor.data.tokenizer import byte_tokenizer, fingerprint

Ids = npt.NDArray[np.unsignedinteger]

_OWN_THREADS = "TOKENIZERS_PARALLELISM"


class Encoder(Protocol):
    """Text to ids, where text is only text: the name of a special token in a document is spelt out, never obeyed."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without special tokens. Raises ValueError when a text cannot be tokenised."""
        ...


def make_encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """The fastest encoder that gives the ids of `tokenizer`."""
    if fingerprint(tokenizer) == fingerprint(byte_tokenizer()):
        return ByteEncoder()
    return FastEncoder(tokenizer)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep the tokenizers library from starting threads of its own, while threads of ours call it side by side."""
    before = os.environ.get(_OWN_THREADS)
    os.environ[_OWN_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_OWN_THREADS]
        else:
            os.environ[_OWN_THREADS] = before


class ByteEncoder:
    """The ids of the byte tokenizer, which are the bytes."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class FastEncoder:
    """The ids of any fast tokenizer; its padding, truncation and templates do not apply.

    One call uses all cores, except inside `one_thread_each`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the tokenizers library raises plain Exception
            first = f"the first of which begins {texts[0][:40]!r}"
            raise ValueError(f"the tokenizer cannot encode one of {len(texts)} documents, {first}: {error}") from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
