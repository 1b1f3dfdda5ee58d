"""How fast a run goes and what it takes: tokens per second, model FLOPs utilisation, peak memory.

Model FLOPs utilisation (arXiv 2204.02311, appendix B) is the FLOPs of the model per second over those that the devices
reach on large matrix products. The former are three forward passes by the complete rule of `mor.model.cost`, at the
depths that tokens really took; what gradient checkpointing computes again does not count. The latter are measured when
a process first trains, so that the figure means the same on every device.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mor.model.configuration_mor import MorConfig
from mor.model.cost import TRAINING_FACTOR, complete_flops
from mor.train.ranks import Ranks

MACHINE_KEYS = frozenset({"seconds", "tokens_per_second", "mfu", "peak_memory_gib"})  # of a training record
GIB = 2**30


def training_flops_per_token(config: MorConfig, sequence_length: int, shares: Sequence[float]) -> float:
    """FLOPs of training on one token when `shares[r]` of the tokens are active at recursion r.

    Every sequence is priced at the mean share: a router whose load differs from row to row pays a little more for
    attention, which grows with the square of a row's tokens.
    """
    active = [share * sequence_length for share in shares]
    return TRAINING_FACTOR * complete_flops(config, sequence_length, active=active) / sequence_length


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of `device` on large square products of `dtype`, measured. Random generators are left as they were."""
    size, tries = (8192, 20) if device.type == "cuda" else (1024, 3)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    seconds = _cuda_seconds(a, b, tries) if device.type == "cuda" else _host_seconds(a, b, tries)
    return 2.0 * size**3 / seconds


def _host_seconds(a: Tensor, b: Tensor, tries: int) -> float:
    """The shortest time of a product: the first ones are slower, and so are all while others use the processor."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times)


def _cuda_seconds(a: Tensor, b: Tensor, tries: int) -> float:
    """The mean time of a product, in a row of them as a step has, after a few to warm up."""
    for _ in range(3):
        torch.mm(a, b)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(tries):
        torch.mm(a, b)
    end.record()
    torch.cuda.synchronize(a.device)
    return start.elapsed_time(end) / 1000 / tries


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that tensors on a GPU have taken since the last reset, elsewhere this process in all its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def known_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """`matmul_ceiling` as it was when this process first asked: a process may train several models."""
    return _once(matmul_ceiling, device, dtype)


@functools.cache
def _once(measure: Callable[[torch.device, torch.dtype], float], device: torch.device, dtype: torch.dtype) -> float:
    return measure(device, dtype)


class Pace:
    """Measures a run's speed between two log lines, and its memory since it started or was resumed.

    All ranks must make it and call `peak_memory_gib`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        self._ceiling = sum(ranks.each(partial(known_ceiling, device, dtype)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.clear()

    def add(self, seconds: float, tokens: int) -> None:
        """A step of all ranks took `seconds` for `tokens`."""
        self._seconds += seconds
        self._tokens += tokens

    def clear(self) -> None:
        """Start the next log interval."""
        self._seconds, self._tokens = 0.0, 0

    def speed(self, flops_per_token: float) -> dict[str, float]:
        """`tokens_per_second` of all ranks, and `mfu`: their share of what the devices together can do."""
        rate = self._tokens / max(self._seconds, 1e-9)
        return {"tokens_per_second": rate, "mfu": rate * flops_per_token / self._ceiling}

    def peak_memory_gib(self) -> float:
        """Of the rank that took most."""
        return max(self._ranks.each(partial(peak_memory_gib, self._device)))
