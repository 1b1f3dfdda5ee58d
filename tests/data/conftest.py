"""Small corpora as token shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mor.data.shards import TokenShards, write_shards
from mor.data.tokenizer import byte_tokenizer

MakeShards = Callable[..., TokenShards]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """make_shards(documents, split="train", **options): byte-token shards of `documents`, in a folder of their own."""
    made: list[Path] = []

    def make(documents: Sequence[str], split: Any = "train", **options: Any) -> TokenShards:
        made.append(tmp_path / f"shards-{len(made)}")
        options = {"validation_fraction": 0, **options}
        write_shards(documents, byte_tokenizer(), made[-1], **options)
        return TokenShards(made[-1], split)

    return make
