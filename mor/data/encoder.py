"""Documents to token ids, in batches."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mor.data.tokenizer import byte_tokenizer, fingerprint

Ids = npt.NDArray[np.unsignedinteger]


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


class ByteEncoder:
    """The ids of the byte tokenizer, which are the bytes."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class FastEncoder:
    """The ids of any fast tokenizer, on all cores; padding, truncation and templates of `tokenizer` do not apply."""

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
