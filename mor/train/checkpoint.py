"""Checkpoints: folders that appear whole, hold everything a run needs to go on, and are checked before they are used.

    checkpoints/step-00000100/
        config.json, model.safetensors, ...   the model, as `save_pretrained` writes it
        training_state.safetensors            optimizer moments, random states, measurements of the unfinished interval
        training_state.json                   counters, data position, options; size and SHA-256 of every other file

Nothing is unpickled: JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mor.files import new_folder, remove_folder, remove_leftovers
from mor.train.quiet import without_progress_bars

TENSORS, VALUES = "training_state.safetensors", "training_state.json"
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
    tensors: dict[str, Tensor]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = [entry for entry in folder.glob("step-*") if entry.is_dir() and _NAME.fullmatch(entry.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def save(
    folder: Path, step: int, *, model: PreTrainedModel, tensors: dict[str, Tensor], values: dict[str, Any], keep: int
) -> Path:
    """Write checkpoint `step` into `folder`, then remove all but the newest `keep` up to this step.

    `values` must be JSON, its finite numbers included. Raises CheckpointError when the disk does not take it; what was
    in `folder` before is then still there.
    """
    path = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with new_folder(path, replace=True) as partial, without_progress_bars():
            model.save_pretrained(partial)
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
            _write_values(partial, step, values)
    except (OSError, SafetensorError) as error:
        rest = list_checkpoints(folder)
        intact = f"{rest[-1]} is still intact" if rest else "there is no earlier checkpoint"
        raise CheckpointError(f"could not write checkpoint {path}: {error}; {intact}") from error
    for old in [entry for entry in list_checkpoints(folder) if _step_of(entry) <= step][:-keep]:
        remove_folder(old)
    return path


def _write_values(folder: Path, step: int, values: dict[str, Any]) -> None:
    files = {entry.name: _fingerprint(entry) for entry in sorted(folder.iterdir())}
    record = {"format": FORMAT, "step": step, "files": files, "values": values}
    record["digest"] = _digest(record)
    (folder / VALUES).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """Check and read the checkpoint `path`. Raises CheckpointError naming the damaged file."""
    record = _read_values(path / VALUES)
    for name, expected in record["files"].items():
        _check_file(path / name, expected)
    try:
        # Copies stand at the allocator's alignment, as before: matrix products may round by it.
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS} cannot be read: {error}") from error
    return Checkpoint(folder=path, step=record["step"], values=record["values"], tensors=tensors)


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
    if _fingerprint(path) != expected:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, or None when there is none at all.

    Warns about each damaged one it passes over. Raises CheckpointError when all are damaged.
    """
    failures = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read(path)
        except CheckpointError as error:
            failures.append(error)
            warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
    if failures:
        raise CheckpointError(f"no checkpoint in {folder} can be used; the newest: {failures[0]}")
    return None
