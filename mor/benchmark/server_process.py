"""`mor serve` in a process of its own, for measuring."""

from __future__ import annotations

import cProfile
import multiprocessing.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

from mor.serve.worker import EngineSource

if TYPE_CHECKING:
    from mor.engine.engine import Engine

READY = "ready:"


@dataclass(frozen=True, kw_only=True)
class ProfiledSource:
    """The engine of `source`, in a process that is watched by a profiler from when it is ready; `file` tells at the end
    what took its time."""

    source: EngineSource
    file: str

    def open(self) -> Engine:
        engine, profile = self.source.open(), cProfile.Profile()
        engine.warm_up()
        multiprocessing.util.Finalize(None, profile.dump_stats, (self.file,), exitpriority=0)
        profile.enable()
        return engine


@contextmanager
def server_process(model: str | Path, options: Sequence[str] = ()) -> Iterator[tuple[str, list[int]]]:
    """The URL of a server of `model` that is ready, and the ids of its processes (its own first, then the engine's).

    Raises RuntimeError when it does not start.
    """
    with started([sys.executable, "-m", "mor", "serve", str(model), "--port", "0", *options]) as server:
        yield server


@contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """As `server_process`, of any command that says when it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                raise RuntimeError(f"the server did not start: {line or 'it ended'}")
            yield line.split()[-1], [process.pid, *_engines(process.pid)]
        finally:
            process.terminate()
            process.wait(60)


def _engines(pid: int) -> list[int]:
    """Engines among the children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def metric(url: str, name: str) -> float:
    """A number of the server's /metrics. Raises KeyError when there is none of this name."""
    with urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return float(values[name])
