"""Tokenizers: the built-in one of bytes, byte-level BPE trained on documents, and any Hugging Face fast tokenizer."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mor.files import new_folder

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256

# Names under which published tokenizers keep the token that ends a document, for a tokenizer.json without its settings.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, whose id is the byte, and 256 for the end of a document. Lossless for any text."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap(tokenizer)


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens, the end of a document (id 0) and all 256 bytes among them.

    Digits are split singly. The same documents give the same tokenizer. Raises ValueError for a `vocab_size` that
    cannot hold the bytes or for no text at all; warns when the documents do not yield that many tokens.
    """
    smallest = NUM_BYTES + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}: 256 bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_nonempty(documents), trainer=trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        found = tokenizer.get_vocab_size()
        warnings.warn(
            f"vocab_size={vocab_size} was asked for, but the documents yield only {found} tokens", stacklevel=2
        )
    return _wrap(tokenizer)


def load_tokenizer(path_or_name: str | Path, *, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer at `path_or_name`: "byte", a folder that holds a tokenizer.json, or such a file itself.

    `eos_token` names the token that ends a document where the tokenizer's own settings do not. Raises FileNotFoundError
    when nothing is there, ValueError when it is not a fast tokenizer or has no token for the end of a document.
    """
    if str(path_or_name) == "byte":
        return byte_tokenizer()
    path = Path(path_or_name)
    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}; give a folder, a tokenizer.json, or 'byte' for the built-in one"
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no tokenizer.json; only Hugging Face fast tokenizers can be used")
    return _with_eos(_read(file), eos_token, file)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write `tokenizer` to a new folder, whole or not at all, for `AutoTokenizer.from_pretrained` to read.

    Raises FileExistsError when `folder` holds something already, OSError when the disk is full.
    """
    with new_folder(folder) as partial:
        write_tokenizer(tokenizer, partial)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of `tokenizer` into `folder`. Raises OSError when that fails."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the tokenizers library wraps the system's errors into plain Exception
        system_error = re.search(r"\(os error (\d+)\)", str(error))
        if system_error is None:
            raise
        raise OSError(int(system_error[1]), f"{folder} cannot be written: {error}") from error


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 (hexadecimal) of all that turns a document into ids: vocabulary, merges, normalisation, splitting, end.

    Saving, loading, padding, truncation and chat templates do not change it.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    parts["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id plus one: what a model's `vocab_size` must at least be."""
    return max(tokenizer.get_vocab().values()) + 1


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself if printable, else the next one from 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character): character for character in alphabet if ord(character) < NUM_BYTES}
    others = iter(alphabet[len(printable) :])
    return [printable.get(byte) or next(others) for byte in range(NUM_BYTES)]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _nonempty(documents: Iterable[str]) -> Iterator[str]:
    count = 0
    for document in documents:
        count += bool(document)
        yield document
    if not count:
        raise ValueError("the corpus is empty: a tokenizer cannot be trained on no text")


def _read(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `file`, with the settings beside it if the file has its usual name."""
    try:
        if file.name == "tokenizer.json":
            return PreTrainedTokenizerFast.from_pretrained(str(file.parent), clean_up_tokenization_spaces=False)
        return PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error


def _with_eos(tokenizer: PreTrainedTokenizerFast, eos_token: str | None, file: Path) -> PreTrainedTokenizerFast:
    known = tokenizer.get_vocab()
    if eos_token is None and tokenizer.eos_token is None:
        eos_token = next((token for token in _KNOWN_ENDS if token in known), None)
        if eos_token is None:
            raise ValueError(f"{file} names no token that ends a document; give eos_token")
    if eos_token is not None:
        if eos_token not in known:
            raise ValueError(f"eos_token={eos_token!r} is not in the vocabulary of {file}")
        tokenizer.add_special_tokens({"eos_token": eos_token})
    return tokenizer
