"""The demo's progress: one bar per model, or lines where there is no terminal."""

from __future__ import annotations

from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mor.train.progress import PlainProgress, ProgressReporter


class ArmBars:
    """Bars for several models that train one after the other; a context manager that hands out reporters.

    Each bar shows steps, training loss, tokens/s, mean depth, held-out bits per byte and the time left.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
        )

    def __enter__(self) -> ArmBars:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def add(self, title: str, steps: int) -> ProgressReporter:
        """A reporter for the next model; its bar appears at once."""
        if not self._console.is_terminal:
            return PlainProgress(cast(TextIO, self._console.file), label=title)
        return ArmBar(self._bars, self._bars.add_task(f"{title:<10}", total=steps, start=False, figures="waiting"))


class ArmBar:
    """One model's bar: a `mor.train.progress.ProgressReporter`."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task
        self._training = self._held_out = ""

    def start(self, *, steps: int, step: int) -> None:
        self._bars.start_task(self._task)
        self._bars.update(self._task, total=steps, completed=step, figures="")

    def advance(self, step: int) -> None:
        self._bars.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "training":
            speed, depth = record["tokens_per_second"], record["mean_depth"]
            self._training = f"loss {record['loss']:.2f}  {speed:,.0f} tok/s  depth {depth:.2f}"
        else:
            self._held_out = f"  {record['decisions']['causal']['bits_per_byte']:.2f} bits/byte"
        self._bars.update(self._task, figures=self._training + self._held_out)

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False)

    def close(self) -> None: ...
