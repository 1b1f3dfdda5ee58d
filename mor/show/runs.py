"""Runs of `mor train` as their journals tell them, finished or still going: what they reached, and their curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.show.comparison import Cell
from mor.show.numbers import compact, count, percent
from mor.train.journal import read_journal
from mor.train.run_folder import flat_options

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its options by dotted name, and the lines of its metrics.jsonl so far, by kind and in order of steps."""

    name: str
    options: dict[str, Any]
    training: tuple[Record, ...] = ()
    evaluations: tuple[Record, ...] = ()

    @property
    def share_done(self) -> float:
        """Steps taken, as a share of those planned."""
        steps = [records[-1]["step"] for records in (self.training, self.evaluations) if records]
        return max(steps, default=0) / self.options["training.steps"]

    @property
    def causal(self) -> dict[str, float]:
        """The newest scores under the causal rule; empty before the first evaluation."""
        return self.evaluations[-1]["decisions"]["causal"] if self.evaluations else {}

    def median(self, key: str) -> float | None:
        """The middle value of `key` over all training lines that have it."""
        values = [line[key] for line in self.training if key in line]
        return statistics.median(values) if values else None

    def newest(self, key: str) -> float | None:
        """`key` in the newest training line, if it is there."""
        return self.training[-1].get(key) if self.training else None


@dataclass(frozen=True, kw_only=True)
class RunColumn:
    """A column of the table of runs: its header, a run's value if it has one yet, how it is written, whether low or
    high is good (0: neither, or not comparable), and whether a terminal leaves it out for want of room."""

    header: str
    unit: str
    value: Callable[[Run], float | None]
    write: Callable[[float], str]
    better: int = 0
    only_on_page: bool = False


RUN_COLUMNS: tuple[RunColumn, ...] = (
    RunColumn(header="done", unit="of its steps", value=lambda run: run.share_done, write=percent),
    RunColumn(header="tokens", unit="read", value=lambda run: run.newest("tokens"), write=count, only_on_page=True),
    RunColumn(header="FLOPs", unit="training", value=lambda run: run.newest("flops"), write=compact, only_on_page=True),
    RunColumn(header="NLL", unit="causal, nats", value=lambda run: run.causal.get("nll"), write="{:.3f}".format),
    RunColumn(
        header="bits/byte",
        unit="causal",
        value=lambda run: run.causal.get("bits_per_byte"),
        write="{:.3f}".format,
        better=-1,
    ),
    RunColumn(
        header="depth", unit="causal, mean", value=lambda run: run.causal.get("mean_depth"), write="{:.2f}".format
    ),
    RunColumn(
        header="tok/s", unit="median", value=lambda run: run.median("tokens_per_second"), write=compact, better=1
    ),
    RunColumn(header="MFU", unit="median", value=lambda run: run.median("mfu"), write=percent, better=1),
    RunColumn(
        header="GiB", unit="peak memory", value=lambda run: run.newest("peak_memory_gib"), write=compact, better=-1
    ),
)


def run_cells(runs: Sequence[Run]) -> list[list[Cell]]:
    """The table's cells, one row per run in `RUN_COLUMNS` order; – where a run has no value yet."""
    return [[_cell(column, run, runs) for column in RUN_COLUMNS] for run in runs]


def _cell(column: RunColumn, run: Run, runs: Sequence[Run]) -> Cell:
    value = column.value(run)
    if value is None:
        return Cell(text="–")
    others = [other for other in map(column.value, runs) if other is not None]
    is_best = (
        bool(column.better) and len(others) > 1 and column.better * value == max(column.better * o for o in others)
    )
    return Cell(text=column.write(value), best=is_best)


def is_run(folder: Path) -> bool:
    """Whether `folder` is one that `mor train` made."""
    return (folder / "options.json").is_file()


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in `folders`, each under the shortest end of its path that tells it from the others.

    Raises FileNotFoundError or ValueError naming a folder that is missing, holds no run, or is given twice.
    """
    paths = [_checked(Path(folder)) for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(f"{folders[index]} is given twice")
    return [_read(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]


def _checked(folder: Path) -> Path:
    if not folder.exists():
        raise FileNotFoundError(f"no such run: {folder}")
    if not is_run(folder):
        raise ValueError(f"{folder} holds no run: it has no options.json, which `mor train` writes first")
    return folder.resolve()


def _read(folder: Path, name: str) -> Run:
    options, journal = folder / "options.json", folder / "metrics.jsonl"
    try:
        values = flat_options(json.loads(options.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{options} holds no options of a run: {error}") from error
    if "training.steps" not in values:
        raise ValueError(f"{options} holds no options of a run: it has no training.steps")
    records = read_journal(journal) if journal.is_file() else []
    kinds = {kind: tuple(r for r in records if r["kind"] == kind) for kind in ("training", "evaluation")}
    return Run(name=name, options=values, training=kinds["training"], evaluations=kinds["evaluation"])


def _short_names(paths: Sequence[Path]) -> list[str]:
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def differing_options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Options that are not alike in all runs, but for the output: by dotted name, each run's value as text."""
    names = sorted({name for run in runs for name in run.options} - {"output"})
    rows = {name: [_written(run.options.get(name)) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _written(value: object) -> str:
    return "–" if value is None else str(value)
