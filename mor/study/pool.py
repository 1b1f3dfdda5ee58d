"""Running studies in parallel: processes that each take the next run, on the CUDA devices in turn or on the CPU.

The parent alone hands out runs, so each is claimed once. SIGINT, SIGTERM and the time limit let the running ones stop
at a checkpoint; the same command goes on later.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from mor.study.grid import Study, StudyRun, distinct
from mor.study.places import Places
from mor.study.progress import StudyProgress, Tally
from mor.study.runner import StudyOutcome, Tell, is_done
from mor.study.worker import Word, work
from mor.train.interrupt import Interrupt

TICK = 0.5  # seconds
GRACE = 30.0  # seconds that a run has for its checkpoint, or to be measured, when all stops


@dataclass(kw_only=True)
class Worker:
    """A process, its pipe, the run it has, the one it had last, and whether the former trains, rather than being
    measured."""

    process: BaseProcess
    pipe: Connection
    run: StudyRun | None = None
    last: StudyRun | None = None
    is_training: bool = False


def run_in_parallel(
    studies: Sequence[Study],
    places: Places,
    *,
    jobs: int,
    seconds: float | None = None,
    devices: Sequence[str] | None = None,
    tell: Tell = print,
) -> StudyOutcome:
    """Run what is missing of `studies` in `jobs` processes. A run that fails is told by name, and the others go on.

    `seconds`: after which no run starts and the running ones stop. `devices`: CUDA devices by number, which processes
    get in turn; None: all there are.

    Raises ValueError as `run_studies`, before anything starts.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    with places.claimed():
        runs = distinct(studies)
        missing = [run for run in runs if not is_done(run, places)]
        outcome = StudyOutcome(skipped=len(runs) - len(missing))
        if not missing:
            return outcome
        start = _starter(places, _cuda_devices() if devices is None else devices, min(jobs, len(missing)))
        return Pool(missing, start, outcome=outcome, jobs=min(jobs, len(missing)), tell=tell).run(seconds)


def _cuda_devices() -> list[str]:
    import torch

    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in given.split(",") if device]
    return [str(number) for number in range(torch.cuda.device_count())]


def _starter(places: Places, devices: Sequence[str], jobs: int) -> Callable[[int], Worker]:
    context = multiprocessing.get_context("spawn")

    def start(number: int) -> Worker:
        ours, theirs = context.Pipe()
        device = devices[number % len(devices)] if devices else None
        process = context.Process(target=work, args=(theirs, places, device, jobs), name=f"study-{number}")
        process.start()
        theirs.close()
        return Worker(process=process, pipe=ours)

    return start


class Pool:
    """Hands out runs to workers until there are none."""

    def __init__(
        self,
        runs: Sequence[StudyRun],
        start: Callable[[int], Worker],
        *,
        outcome: StudyOutcome,
        jobs: int,
        tell: Tell,
    ) -> None:
        self._waiting, self._start, self._outcome, self._jobs, self._tell = deque(runs), start, outcome, jobs, tell
        self._workers: dict[int, Worker] = {}
        self._last_moment: float | None = None
        self._tally = Tally(runs)
        self._progress = StudyProgress(self._tally, tell)

    def run(self, seconds: float | None) -> StudyOutcome:
        """Until all runs are done, or stopped by a signal or after `seconds`.

        Raises RuntimeError when a worker cannot start.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            with Interrupt() as interrupt:
                for number in range(self._jobs):
                    self._workers[number] = self._start(number)
                while self._workers and not self._is_out_of_patience:
                    self._listen()
                    self._progress.show()
                    is_late = deadline is not None and time.monotonic() > deadline
                    if (interrupt.requested or is_late) and not self._is_stopping:
                        self._stop("the time is up" if is_late else "interrupted")
        finally:
            self._end()
        return self._outcome

    @property
    def _is_stopping(self) -> bool:
        return self._last_moment is not None

    @property
    def _is_out_of_patience(self) -> bool:
        return self._last_moment is not None and time.monotonic() > self._last_moment

    def _listen(self) -> None:
        numbers = {worker.pipe: number for number, worker in self._workers.items()}
        for pipe in wait(list(numbers), timeout=TICK):
            assert isinstance(pipe, Connection)
            try:
                self._hear(self._workers[numbers[pipe]], pipe.recv())
            except (EOFError, OSError):
                self._lost(numbers[pipe])

    def _hear(self, worker: Worker, word: Word) -> None:
        if word.kind == "ready":
            worker.run = self._next(worker.last) if self._waiting and not self._is_stopping else None
            worker.last = worker.run
            worker.is_training = worker.run is not None
            worker.pipe.send(worker.run)
            return
        run = worker.run
        assert run is not None
        self._tally.set(run, word.tokens, is_done=word.kind == "done")
        worker.is_training = word.kind == "at"
        if word.kind in ("at", "measuring"):
            return
        worker.run = None
        if word.kind == "done":
            self._outcome = replace(self._outcome, ran=self._outcome.ran + 1)
        elif word.kind == "stopped":
            self._outcome = replace(self._outcome, interrupted=True)
        else:
            self._note_failure(run, word.error, word.trace)

    def _next(self, last: StudyRun | None) -> StudyRun:
        """The next run, or one of its neighbours, of which as many start soon as there are processes, if that has the
        shape of the worker's `last`, whose code is then not compiled again."""
        near = itertools.islice(self._waiting, self._jobs)
        alike = next((run for run in near if last is not None and run.shape == last.shape), self._waiting[0])
        self._waiting.remove(alike)
        return alike

    def _note_failure(self, run: StudyRun, error: str, trace: str = "") -> None:
        self._tell(f"{run.name} failed: {error}" + (f"\n{trace.rstrip()}" if trace else ""))
        self._tally.drop(run)
        self._outcome = replace(self._outcome, failed=(*self._outcome.failed, run.name))

    def _lost(self, number: int) -> None:
        """A worker ended: with its work done, stopped, after a failure, or killed with a run in its hands."""
        worker = self._workers.pop(number)
        worker.pipe.close()
        worker.process.join(GRACE)
        code = worker.process.exitcode
        if self._is_stopping:
            cut_short = worker.run is not None
            self._outcome = replace(self._outcome, interrupted=self._outcome.interrupted or cut_short)
            return
        if worker.run is not None:
            self._note_failure(worker.run, f"its process ended with exit code {code}")
        elif code:
            raise RuntimeError(f"a process of the study ended with exit code {code} before it had a run")
        if self._waiting:
            self._workers[number] = self._start(number)

    def _stop(self, why: str) -> None:
        """Stop what trains; what is being measured may finish."""
        self._last_moment = time.monotonic() + GRACE
        training = [worker for worker in self._workers.values() if worker.is_training]
        self._tell(f"{why}: {len(training)} runs stop at a checkpoint, {len(self._waiting)} do not start")
        self._outcome = replace(self._outcome, interrupted=bool(self._waiting or training))
        for worker in training:
            worker.process.terminate()

    def _end(self) -> None:
        """Leave no process behind, whatever happened."""
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
