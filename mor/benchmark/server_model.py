"""A model to serve for measuring: an arm with random weights, and a tokenizer whose every token is text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mor.benchmark.arms import build_arm
from mor.data.tokenizer import END_OF_TEXT, write_tokenizer
from mor.quiet import without_progress_bars


def save_arm(folder: Path, name: str, size: str, *, max_length: int, mean_depth: float | None = None) -> float | None:
    """The arm `name` with `size`'s dimensions and a tokenizer in `folder`, in bfloat16 where there is CUDA.

    Returns the mean depth to ask for with each request, None for a model without a dial.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arm = build_arm(name, size, mean_depth=mean_depth, max_length=max_length, device=device, dtype=dtype)
    with without_progress_bars():
        arm.model.save_pretrained(folder)
    write_tokenizer(text_tokenizer(arm.model.config.vocab_size), folder)
    return arm.mean_depth


def text_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: the end of a text, the bytes, and made-up words, so that random tokens decode as
    those of a trained tokenizer do."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{number}" for number in range(vocab_size - 1 - len(characters))]
    vocabulary = {word: number for number, word in enumerate([END_OF_TEXT, *characters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
