"""What the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from tests.commands.running import TEXT, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    write_shards(TEXT.split("\n\n"), byte_tokenizer(), folder, validation_fraction=0.2)
    return folder
