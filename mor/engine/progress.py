"""What an engine did so far, and a bar that shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mor.engine.outputs import RequestOutput
from mor.engine.scheduler import Scheduler


@dataclass(kw_only=True)
class Statistics:
    """Counts since the engine began: visits, rows that took one, tokens generated, requests that were preempted."""

    visits: int = 0
    rows: int = 0
    tokens: int = 0
    preemptions: int = 0

    def add(self, *, visits: int = 0, rows: int = 0, tokens: int = 0, preemptions: int = 0) -> None:
        """Count more."""
        self.visits += visits
        self.rows += rows
        self.tokens += tokens
        self.preemptions += preemptions


class GenerationBar:
    """Requests finished, tokens per second, mean depth and how many run, on a terminal."""

    def __init__(self, num_requests: int, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("generate"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task("generate", total=num_requests, figures="")
        self._tokens, self._depths, self._start = 0, 0, time.monotonic()

    def __enter__(self) -> GenerationBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, outputs: Sequence[RequestOutput], statistics: Statistics, scheduler: Scheduler) -> None:
        """Show what a step brought."""
        self._tokens += sum(len(output.token_ids) for output in outputs)
        self._depths += sum(sum(output.depths) for output in outputs)
        seconds = max(time.monotonic() - self._start, 1e-9)
        depth = self._depths / max(1, self._tokens)
        figures = f"{self._tokens / seconds:,.0f} tokens/s  mean depth {depth:.2f}  {scheduler.num_running} running"
        finished = sum(output.finished for output in outputs)
        self._progress.update(self._task, advance=finished, figures=figures)
