"""The tokenizer's files that travel with a converted checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_tokenizer(source: str | os.PathLike[str], folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> list[str]:
    """Copy the tokenizer's files that `source` has into `folder`; returns their names."""
    found = [name for name in names if (Path(source) / name).is_file()]
    for name in found:
        shutil.copyfile(Path(source) / name, folder / name)
    return found
