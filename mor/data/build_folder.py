"""The folder in which token shards grow: one builder at a time, and what is complete outlives a builder that stops."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mor.data.manifest import FILE_NAME
from mor.files import TEMPORARY, refuse_occupied, sync, write_json

STATE_FILE = "build.json"


class BuildFolder:
    """A folder beside `target`, which becomes `target` when it is finished.

    `keep(checkpoint)` makes what was written so far outlive this process; a later builder with the same `plan` finds it
    in `checkpoint`. `plan=None` stands for documents of unknown origin, whose building cannot be continued.
    """

    def __init__(self, target: Path, path: Path, plan: dict[str, Any] | None) -> None:
        self.target = target
        self.path = path
        self.plan = plan
        self.checkpoint: dict[str, Any] | None = self._read()

    def keep(self, checkpoint: dict[str, Any]) -> None:
        """Note, on the disk, that the build can go on from `checkpoint`."""
        if self.plan is not None:
            write_json(self.path / STATE_FILE, {"plan": self.plan, "checkpoint": checkpoint})
            self.checkpoint = checkpoint

    def clear(self) -> None:
        """Start anew."""
        self.checkpoint = None
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def finish(self) -> None:
        """Put the folder in its place, on the disk."""
        (self.path / STATE_FILE).unlink(missing_ok=True)
        for entry in sorted(self.path.rglob("*")):
            sync(entry)
        sync(self.path)
        refuse_occupied(self.target)
        os.rename(self.path, self.target)
        sync(self.target.parent)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
            return found["checkpoint"] if self.plan is not None and found["plan"] == self.plan else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@contextlib.contextmanager
def build_folder(
    target: Path, plan: dict[str, Any] | None, waiting: Callable[[Path], None]
) -> Iterator[BuildFolder | None]:
    """The folder in which to build `target`; None when `target` has a manifest already.

    While another process builds the same target this one waits, after a call of `waiting`. When the block fails, what
    was kept stays for the next builder, and all else is removed; what others put at `target` is never touched. Raises
    FileExistsError for a `target` that holds something else, OSError naming it when the disk is full.
    """
    partial = target.with_name(f"{TEMPORARY}{target.name}")
    with contextlib.ExitStack() as stack:
        while not (target / FILE_NAME).exists():
            refuse_occupied(target)
            partial.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(_lock(partial, waiting)):
                stack.close()
                continue
            folder = BuildFolder(target, partial, plan)
            stack.enter_context(_failing_well(folder))
            yield folder
            return
        yield None


@contextlib.contextmanager
def _failing_well(folder: BuildFolder) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if folder.checkpoint is None:
            shutil.rmtree(folder.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            rest = "nothing of it was kept"
            if folder.checkpoint is not None:
                rest = "what is complete was kept: make room, and the same command goes on from there"
            raise OSError(error.errno, f"the disk is full: {folder.target} could not be written; {rest}") from error
        raise


@contextlib.contextmanager
def _lock(folder: Path, waiting: Callable[[Path], None]) -> Iterator[bool]:
    """Hold `folder` alone; whether it is still there under its name once that has succeeded."""
    try:
        import fcntl
    except ImportError:  # Windows: builders of one folder are not kept apart
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # the other builder has just finished
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _is_same(folder, descriptor)
    finally:
        os.close(descriptor)


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
