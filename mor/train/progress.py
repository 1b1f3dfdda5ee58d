"""What a run shows while it trains: a live bar in a terminal, now and then a plain line elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressReporter(Protocol):
    """Told by the loop what happens. `start` comes first, `close` last, whatever went wrong."""

    def start(self, *, steps: int, step: int) -> None:
        """The run goes from `step` finished steps to `steps`."""
        ...

    def advance(self, step: int) -> None:
        """`step` steps are finished."""
        ...

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...

    def close(self) -> None:
        """Training ended."""
        ...


class SilentProgress:
    """Shows nothing."""

    def start(self, *, steps: int, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def record(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def training_figures(record: dict[str, Any]) -> str:
    """Loss, speed, utilisation and mean depth of a training record, in a few words."""
    speed = f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}"
    return f"loss {record['loss']:.3f}  {speed}  mean depth {record['mean_depth']:.2f}"


def evaluation_figures(record: dict[str, Any]) -> str:
    """Quality under each decision rule of an evaluation record; every figure says its rule."""
    parts = [
        f"{decision}: {scores['bits_per_byte']:.3f} bits per byte at mean depth {scores['mean_depth']:.2f}"
        for decision, scores in record["decisions"].items()
    ]
    return f"step {record['step']}: {', '.join(parts)}"


class BarProgress:
    """A bar with steps, loss, tokens/s, mean depth and time left, for terminals."""

    def __init__(self, console: Console, *, label: str = "train") -> None:
        self._label = label
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None

    def start(self, *, steps: int, step: int) -> None:
        self._task = self._bar.add_task(self._label, total=steps, completed=step, figures="")
        self._bar.start()

    def advance(self, step: int) -> None:
        assert self._task is not None
        self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        assert self._task is not None
        if record["kind"] == "training":
            self._bar.update(self._task, figures=training_figures(record))
        else:
            self._bar.console.print(evaluation_figures(record), highlight=False)

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


class PlainProgress:
    """A line for every evaluation, and at most every `seconds` one for training, for logs."""

    def __init__(self, stream: TextIO, *, seconds: float = 30.0, label: str = "train") -> None:
        self._stream, self._seconds, self._label = stream, seconds, label
        self._steps, self._first, self._started, self._shown = 0, 0, 0.0, 0.0

    def start(self, *, steps: int, step: int) -> None:
        self._steps, self._first = steps, step
        self._started = self._shown = time.monotonic()

    def advance(self, step: int) -> None: ...

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] != "training":
            self.note(evaluation_figures(record))
            return
        now, step = time.monotonic(), record["step"]
        if now - self._shown < self._seconds and step < self._steps:
            return
        self._shown = now
        left = (now - self._started) / max(1, step - self._first) * (self._steps - step)
        self.note(f"step {step}/{self._steps}  {training_figures(record)}  {left:.0f} s left")

    def note(self, text: str) -> None:
        print(f"{self._label}: {text}", file=self._stream, flush=True)

    def close(self) -> None: ...


def progress_for(stream: TextIO | None = None, *, label: str = "train") -> ProgressReporter:
    """A bar if `stream` (default: standard error) is a terminal, else plain lines."""
    target = sys.stderr if stream is None else stream
    if target.isatty():
        return BarProgress(Console(file=target), label=label)
    return PlainProgress(target, label=label)
