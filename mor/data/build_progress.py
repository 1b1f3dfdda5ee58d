"""How far the building of token shards is: a bar on a terminal, and how fast it went."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mor.data.build import ShardProgress

_PRINT_SECONDS = 30.0


class BuildProgress:
    """What `build_shards` calls: shows documents/s, MB/s of text, tokens, and the time left if the size is known.

    Where there is no terminal it prints a line every half minute. Speeds are those of this process: what an earlier one
    wrote is not counted.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("tokenising"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._bars.add_task("", total=None, figures="")
        self._first: tuple[float, ShardProgress] | None = None
        self._last: tuple[float, ShardProgress] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> "BuildProgress":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, done: ShardProgress) -> None:
        """Show where the build is."""
        now = time.monotonic()
        self._last = (now, done)
        if self._first is None:
            self._first = (now, done)
        figures = f"{done.documents:,} documents, {_short(done.tokens)} tokens{self._speed()}"
        total = None if done.share is None else 1.0
        self._bars.update(self._task, completed=done.share or 0.0, total=total, figures=figures)
        if not self._console.is_terminal and now - self._printed > _PRINT_SECONDS:
            self._printed = now
            share = "" if done.share is None else f" ({done.share:.0%})"
            self._console.print(f"tokenising: {figures}{share}", highlight=False)

    def summary(self) -> str | None:
        """How fast this process was on average; None when it did too little to tell."""
        rates = self._rates()
        if rates is None:
            return None
        seconds, documents, megabytes, tokens = rates
        return f"{seconds:.0f} s: {tokens:,.0f} tokens/s, {megabytes:.2f} MB/s of text, {documents:,.0f} documents/s"

    def _speed(self) -> str:
        rates = self._rates()
        return "" if rates is None else f", {rates[1]:,.0f} documents/s, {rates[2]:.1f} MB/s"

    def _rates(self) -> tuple[float, float, float, float] | None:
        """(seconds, documents/s, 10^6 bytes/s, tokens/s) since the first batch was done."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return None
        (start, before), (end, now) = self._first, self._last
        seconds = end - start
        return (
            seconds,
            (now.documents - before.documents) / seconds,
            (now.utf8_bytes - before.utf8_bytes) / seconds / 1e6,
            (now.tokens - before.tokens) / seconds,
        )


def _short(number: int) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
