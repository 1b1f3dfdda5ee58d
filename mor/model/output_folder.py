"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def output_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends well, flush its files and rename it to `path`.

    When the block raises, nothing is left behind. Raises ValueError when `path` already holds something.
    """
    target = Path(path).absolute()
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(target.parent)


def refuse_occupied(path: str | os.PathLike[str]) -> None:
    """Raise ValueError when `path` is a file or a folder that is not empty."""
    target = Path(path)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise ValueError(f"{target} already exists; choose another output folder or remove it")


def copy_tokenizer(source: str | os.PathLike[str], folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> list[str]:
    """Copy the tokenizer's files that `source` has into `folder`; returns their names."""
    found = [name for name in names if (Path(source) / name).is_file()]
    for name in found:
        shutil.copyfile(Path(source) / name, folder / name)
    return found


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
