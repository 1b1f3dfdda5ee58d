"""Several processes that train together on this machine, as torchrun would start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mor.config import to_dict
from mor.train.options import RunOptions

ROOT = Path(__file__).parents[2]
SECONDS = 120


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, and that it should not leave this machine."""
    values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_PORT=port, OMP_NUM_THREADS=1)
    return {name: str(value) for name, value in values.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def work(size: int, task: Callable[..., Any], *arguments: Any, restarts: int = 0) -> list[Any]:
    """What `task(*arguments)`, a function of `worker`, returns on each of `size` ranks. AssertionError with the
    tracebacks when one failed.
    """
    outcomes = attempt(size, task, *arguments, restarts=restarts)
    errors = [error for _, error in outcomes if error]
    assert not errors, "\n".join(errors)
    return [value for value, _ in outcomes]


def attempt(size: int, task: Callable[..., Any], *arguments: Any, restarts: int = 0) -> list[tuple[Any, str | None]]:
    """Value and error of `task(*arguments)` on each of `size` ranks. `restarts`: how often torchrun started them again.

    The ranks are forked from a server that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.worker"])
    port, ends, processes = free_port(), [], []
    for rank in range(size):
        end, other_end = context.Pipe(duplex=False)
        environment = rank_environment(rank, size, port) | {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
        process = context.Process(target=_child, args=(environment, other_end, task, arguments))
        process.start()
        other_end.close()
        ends.append(end)
        processes.append(process)
    try:
        return [_answer(end) for end in ends]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _answer(end: Connection) -> tuple[Any, str | None]:
    try:
        return end.recv() if end.poll(SECONDS) else (None, "no answer")
    except EOFError:
        return None, "died"


def _child(environment: dict[str, str], end: Connection, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    try:
        end.send((task(*arguments), None))
    except BaseException:
        end.send((None, traceback.format_exc()))


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    """`python words...` in this checkout."""
    base = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | base | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def as_json(options: RunOptions) -> str:
    """Options as one word of a command line."""
    return json.dumps(to_dict(options))
