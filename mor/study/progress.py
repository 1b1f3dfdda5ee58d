"""How far studies are that run in parallel: runs, tokens, speed and time left, in a line now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from mor.show.numbers import compact, duration
from mor.study.grid import StudyRun

WINDOW = 60.0  # seconds that the speed is a mean over


class Tally:
    """Tokens trained so far, by run."""

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        self._planned = {run.key: run.tokens for run in runs}
        self._first: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self.done = 0

    def set(self, run: StudyRun, tokens: int, *, is_done: bool = False) -> None:
        """A run is at `tokens`; what a resumed one had at first is not counted as trained now."""
        self._first.setdefault(run.key, 0 if is_done else tokens)
        self._tokens[run.key] = max(tokens, self._tokens.get(run.key, 0))
        self.done += is_done

    def drop(self, run: StudyRun) -> None:
        """A run failed: the rest of it will not be trained."""
        self._planned[run.key] = self._tokens.get(run.key, 0)

    @property
    def runs(self) -> int:
        """All runs."""
        return len(self._planned)

    @property
    def trained(self) -> int:
        """Tokens trained since the start."""
        return sum(tokens - self._first[key] for key, tokens in self._tokens.items())

    @property
    def left(self) -> int:
        """Tokens still to train."""
        return sum(planned - self._tokens.get(key, 0) for key, planned in self._planned.items())


class StudyProgress:
    """Tells a line at most every `seconds`."""

    def __init__(self, tally: Tally, tell: Callable[[str], None], *, seconds: float = 15.0) -> None:
        self._tally, self._tell, self._seconds = tally, tell, seconds
        self._started = self._told = time.monotonic()
        self._past: deque[tuple[float, int]] = deque([(self._started, 0)])

    def show(self) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._told >= self._seconds:
            self._told = now
            self._tell(self.line(now))

    def line(self, now: float) -> str:
        """Where the studies are at `now`."""
        trained = self._tally.trained
        self._past.append((now, trained))
        while len(self._past) > 2 and now - self._past[0][0] > WINDOW:
            self._past.popleft()
        (then, before), left = self._past[0], self._tally.left
        speed = (trained - before) / max(now - then, 1e-9)
        rest = f", {duration(left / speed)} left" if speed > 0 else ""
        return (
            f"{duration(now - self._started)}: {self._tally.done} of {self._tally.runs} runs, "
            f"{compact(trained)} of {compact(trained + left)} tokens, {compact(speed)} tokens/s{rest}"
        )
