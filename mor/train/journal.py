"""metrics.jsonl and spikes.jsonl: one JSON object per line, in the order of steps, none twice whatever was resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mor.files import write_text


class Journal:
    """The measurements of a run. A line is written at once and handed to the operating system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; `record` has a `step` and finite numbers. OSError, and no half line, when the disk is full."""
        line = json.dumps(record, allow_nan=False) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(error.errno, f"{error.strerror}: {self.path} could not take the line of this step") from error

    def sync(self) -> None:
        """Wait until all lines are on the disk, as a checkpoint needs that will not write them again."""
        if self.path.exists():
            with self.path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop what a killed process wrote after `step`, a half-written last line included."""
        if self.path.exists():
            kept = [json.dumps(record) + "\n" for record in read_journal(self.path) if record["step"] <= step]
            write_text(self.path, "".join(kept))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises ValueError, with the line number, for any other line that is not JSON.
    """
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records
