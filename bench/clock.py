"""How the benches of this folder take times, and what the hardware can do at most.

Host times are medians of runs that are waited for; device times are medians between events on the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def wait(device: str) -> None:
    """Until the device has done what is queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """Median time on the host's clock, after a warm-up."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(11):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def milliseconds(run: Callable[[], object], tries: int = 30) -> float:
    """Median time on a CUDA device, by its events, after a warm-up."""
    for _ in range(5):
        run()
    pairs = []
    for _ in range(tries):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy, those read and those written."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * size / seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str) -> float:
    """FLOP/s of a large bfloat16 product of random matrices."""
    side = 8192 if device == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / seconds(lambda: torch.mm(left, right, out=out), device)
