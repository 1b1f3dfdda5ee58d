"""Checkpoints: folders that appear whole, hold everything a run needs to go on, and are checked before they are used.

    checkpoints/step-00000100/
        config.json, model.safetensors, ...   the model, as `save_pretrained` writes it
        training_state.safetensors            optimizer moments, random states, measurements of the unfinished interval
        training_state.json                   counters, data position, options; size and SHA-256 of every other file

Where several processes hold parts of every weight, there are several files of tensors of each kind, see
`sharded_checkpoint`; whoever reads them need not know how many processes wrote them. Nothing is unpickled: JSON and
safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mor.files import new_folder, remove_folder, remove_leftovers
from mor.quiet import without_progress_bars
from mor.train.ranks import OtherRankError, Ranks
from mor.train.stored_tensors import StoredTensors

TENSORS, VALUES = "training_state.safetensors", "training_state.json"
TENSOR_FILES = "training_state*.safetensors"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or is damaged."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files have been checked. `values` and `tensors` are what `save` was given."""

    folder: Path
    step: int
    values: dict[str, Any]
    tensors: StoredTensors


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = [entry for entry in folder.glob("step-*") if entry.is_dir() and _NAME.fullmatch(entry.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def save(
    folder: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    keep: int,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write checkpoint `step` into `folder`, then remove all but the newest `keep` up to this step.

    `values` must be JSON, its finite numbers included. `weights`: the model's, if they were copied before. Raises
    CheckpointError when the disk does not take it; what was in `folder` before is then still there.
    """
    path = path_of(folder, step)
    with named_failure(path):
        prepare(folder)
        with new_folder(path, replace=True) as partial, without_progress_bars():
            model.save_pretrained(partial, state_dict=weights)
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
            files = {entry.name: fingerprint(entry) for entry in sorted(partial.iterdir())}
            write_values(partial, step, values, files)
    remove_old(folder, step, keep)
    return path


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint `step` in `folder`."""
    return folder / f"step-{step:08d}"


def prepare(folder: Path) -> None:
    """Make the folder of checkpoints, and clear what a killed process left half-written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """CheckpointError for what keeps the checkpoint `path` from being written."""
    try:
        yield
    except (OSError, SafetensorError, OtherRankError) as error:
        rest = list_checkpoints(path.parent)
        intact = f"{rest[-1]} is still intact" if rest else "there is no earlier checkpoint"
        raise CheckpointError(f"could not write checkpoint {path}: {error}; {intact}") from error


def remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`."""
    for old in [entry for entry in list_checkpoints(folder) if _step_of(entry) <= step][:-keep]:
        remove_folder(old)


def write_values(folder: Path, step: int, values: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write training_state.json; `files`: the fingerprint of every other file of the checkpoint."""
    record = {"format": FORMAT, "step": step, "files": files, "values": values}
    record["digest"] = _digest(record)
    (folder / VALUES).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Check and read the checkpoint `path`. Raises CheckpointError naming the damaged file.

    Several ranks share the checking; all of them read, or all of them raise.
    """
    ranks = Ranks() if ranks is None else ranks
    try:
        record = ranks.each(lambda: _checked_values(path, ranks))[ranks.rank]
    except OtherRankError as error:
        raise CheckpointError(str(error)) from error
    try:
        tensors = StoredTensors(sorted(path.glob(TENSOR_FILES)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS} cannot be read: {error}") from error
    return Checkpoint(folder=path, step=record["step"], values=record["values"], tensors=tensors)


def _checked_values(path: Path, ranks: Ranks) -> dict[str, Any]:
    record = _read_values(path / VALUES)
    for name in sorted(record["files"])[ranks.rank :: ranks.size]:
        _check_file(path / name, record["files"][name])
    return record


def _read_values(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("digest") != _digest(record):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    if record["format"] != FORMAT:
        raise ValueError(f"{path} has format {record['format']}; this version reads format {FORMAT}")
    return record


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path} is truncated: {size} bytes instead of {expected['bytes']}")
    if fingerprint(path) != expected:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")


def read_latest(folder: Path, ranks: Ranks | None = None) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, or None when there is none at all.

    Warns about each damaged one it passes over. Raises CheckpointError when all are damaged.
    """
    ranks = Ranks() if ranks is None else ranks
    failures = []
    for path in reversed(ranks.first(lambda: list_checkpoints(folder))):
        try:
            return read(path, ranks)
        except CheckpointError as error:
            failures.append(error)
            if ranks.is_first:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if failures:
        raise CheckpointError(f"no checkpoint in {folder} can be used; the newest: {failures[0]}")
    return None
