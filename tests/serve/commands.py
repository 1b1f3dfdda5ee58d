"""`mor serve` and others as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

SECONDS = 90


@contextmanager
def process(command: Sequence[str], *, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended at the end; its output goes to `log`, or can be read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.PIPE if log is None else log.open("w")
    started = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait(SECONDS)
        for stream in (started.stdout, output):
            if hasattr(stream, "close"):
                stream.close()  # type: ignore[union-attr]


@contextmanager
def replica(model: Path, *options: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mor serve` on a free port, ready; the process and its URL."""
    command = [sys.executable, "-m", "mor", "serve", str(model), "--port", "0", "--threads", "1", *options]
    with process(command, log=log) as started:
        yield started, wait_for_url(started, log)


def wait_for_url(started: subprocess.Popen[str], log: Path) -> str:
    """What the line that begins with `ready:` says."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        line = next((line for line in log.read_text().splitlines() if line.startswith("ready:")), None)
        if line is not None:
            return line.split()[-1]
        assert started.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"not ready: {log.read_text()}")


def wait_healthy(url: str, seconds: float = SECONDS) -> None:
    """Until `url`/health says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} is not healthy")
