"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".partial-"


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` in one step. OSError naming `path` when the disk is full; the old file is then kept."""
    partial = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with _named_when_full(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as JSON. ValueError when it holds NaN or infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, beside `path`; it becomes `path`, on the disk, when the block ends without an error.

    What a killed process left half-written under the same name is removed first. Raises FileExistsError when `path`
    holds something, unless it may be replaced, and OSError naming `path` when the disk is full; nothing is then left.
    """
    target = Path(path)
    if not replace:
        refuse_occupied(target)
    partial = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _named_when_full(target):
            partial.mkdir(parents=True)
            yield partial
            for entry in sorted(partial.rglob("*")):
                sync(entry)
            sync(partial)
            _give_place(target, replace)
            os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target.parent)


def _give_place(target: Path, replace: bool) -> None:
    """Make way for a new folder; what others have put there meanwhile is not overwritten unless it may be."""
    if replace:
        remove_folder(target)
    else:
        refuse_occupied(target)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has the lock file `path`, which it then keeps until the block, or itself, ends. Where there
    are no such locks (Windows) it always has."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def refuse_occupied(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError when `path` is a file or a folder that is not empty."""
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; choose another folder or remove it first")


def remove_folder(path: Path) -> None:
    """Remove the folder `path`, if there is one, so that a crash never leaves half of it under its name."""
    if not path.exists():
        return
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for entry in folder.glob(f"{TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _named_when_full(path: Path) -> Iterator[None]:
    """Say which file or folder a full disk kept from being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"the disk is full: {path} could not be written, and nothing of it was kept"
        raise OSError(error.errno, message) from error
