"""A process that trains one run of a study after the other, and tells its parent how far it is."""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mor.data.build import num_cores
from mor.study.grid import StudyRun
from mor.study.places import Places

SECONDS_BETWEEN_WORDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Word:
    """What a worker says. `kind`: `ready` for a run, `at` so many `tokens` of one, `measuring` it, `done` with it,
    `stopped` at a checkpoint, or `failed`, with `error` in a line and `trace` in full."""

    kind: str
    tokens: int = 0
    error: str = ""
    trace: str = ""


def work(pipe: Connection, places: Places, device: str | None, jobs: int) -> None:
    """Take runs from `pipe` until None comes; SIGTERM stops at a checkpoint.

    `device`: the only CUDA device this process sees; None: whatever there is. Ends after a run that failed, since what
    failed on a GPU may have left it unusable for this process.
    """
    os.setpgid(0, 0)  # Ctrl-C is the parent's to hear
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    _prepare(jobs)
    pipe.send(Word(kind="ready"))
    while (run := pipe.recv()) is not None:
        answer = _attempt(run, places, pipe, jobs)
        pipe.send(answer)
        if answer.kind != "done":
            return
        _clear()
        pipe.send(Word(kind="ready"))


def _attempt(run: StudyRun, places: Places, pipe: Connection, jobs: int) -> Word:
    from mor.study.runner import finish_run

    try:
        finished = finish_run(run, places, progress=_Teller(run, pipe), jobs=jobs)
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Word(kind="failed", error=line, trace=traceback.format_exc())
    return Word(kind="done" if finished else "stopped", tokens=run.tokens)


def _prepare(jobs: int) -> None:
    """A fair share of the cores; TensorFloat32 for what runs in float32 on a GPU: calibration and evaluation. Training
    computes in bfloat16."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), max(1, num_cores() // jobs)))
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def _clear() -> None:
    """Forget a run's memory, and of its compiled code what would not serve the next."""
    import torch

    from mor.train.compile import forget_compiled

    forget_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Teller:
    """A progress reporter that tells the parent, now and then, how many tokens a run is at."""

    def __init__(self, run: StudyRun, pipe: Connection) -> None:
        self._per_step, self._pipe, self._said = run.options.training.tokens_per_step, pipe, 0.0
        self._steps = self._step = 0

    def start(self, *, steps: int, step: int) -> None:
        self._steps, self._step = steps, step
        self._tell(step)

    def advance(self, step: int) -> None:
        self._step = step
        if time.monotonic() - self._said > SECONDS_BETWEEN_WORDS:
            self._tell(step)

    def record(self, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None:
        if self._step == self._steps:
            self._tell(self._step, kind="measuring")

    def _tell(self, step: int, *, kind: str = "at") -> None:
        self._said = time.monotonic()
        try:
            self._pipe.send(Word(kind=kind, tokens=step * self._per_step))
        except OSError:  # the parent is gone: stop as it would have asked
            os.kill(os.getpid(), signal.SIGTERM)
