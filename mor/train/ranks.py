"""The processes of one run: who they are, and how they agree.

`torchrun` starts them and says in the environment who is who. What they tell each other here is small and lives on the
host, over gloo; gradients and weights travel elsewhere. A process that was not started by torchrun is a run of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mor.train.rendezvous import agent_store

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another process of the run failed; its own error says why."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `size` of them. `local_rank`: its number on its machine. `host`: their gloo group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the run writes once."""
        return self.rank == 0

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first rank, where alone it runs. Its error is raised there, OtherRankError on
        the others."""
        if self.size == 1:
            return action()
        outcome = _attempt(action) if self.is_first else None
        shared = [outcome.plain() if outcome is not None else None]
        dist.broadcast_object_list(shared, src=0, group=self.host)
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        return _unwrapped(shared)[0]

    def each(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on every rank, in their order. A rank's error is raised there, OtherRankError on the
        others."""
        if self.size == 1:
            return [action()]
        outcome = _attempt(action)
        shared: list[Any] = [None] * self.size
        dist.all_gather_object(shared, outcome.plain(), group=self.host)
        if outcome.error is not None:
            raise outcome.error
        return _unwrapped(shared)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.each(lambda: None)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on the tensor's device, without waiting for it."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def with_own_group(self) -> Ranks:
        """The same ranks with a host group of their own, for use in another thread. All must call it."""
        return self if self.size == 1 else replace(self, host=dist.new_group(backend="gloo"))

    def device_name(self, name: str) -> str:
        """The device `name` for this rank: `auto` and `cuda` mean a GPU of its own. ValueError for a numbered one."""
        if self.size == 1 or name == "cpu":
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device={name!r} is one device, and this run has {self.size} processes; use 'auto'")
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else name


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None

    def plain(self) -> tuple[Any, str | None]:
        return self.value, None if self.error is None else str(self.error)


def _attempt(action: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=action())
    except Exception as error:
        return _Outcome(error=error)


def _unwrapped(outcomes: list[Any]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise OtherRankError(error)
    return [value for value, _ in outcomes]


class Vote:
    """Whether any rank wishes something. The answer comes one call late, so that no rank waits for another."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Tensor, Any] | None = None

    def ask(self, wish: bool) -> bool:
        """Say this rank's wish; returns, alike on all ranks, whether any had it at the call before."""
        if self._ranks.size == 1:
            return wish
        outcome = self.close()
        flag = torch.tensor([int(wish)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._ranks.host, async_op=True)
        self._pending = flag, work
        return outcome

    def close(self) -> bool:
        """Take the last answer; no rank may leave it unread."""
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait()
        return bool(flag.item())


def num_processes() -> int:
    """How many processes this run has, by the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def was_restarted() -> bool:
    """Whether torchrun started this process again after it lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run, connected while the block runs; one rank if torchrun did not start several.

    `device`: `auto`, `cuda` or `cpu`; GPUs are connected by NCCL. Inside another such block the connection is the same.
    """
    if num_processes() == 1:
        yield Ranks()
        return
    if dist.is_initialized():
        yield _connected()
        return
    local_rank = _local_rank()
    uses_cuda = device != "cpu" and torch.cuda.is_available()
    if uses_cuda:
        torch.cuda.set_device(local_rank)
    rank, size = int(os.environ["RANK"]), num_processes()
    store = agent_store(rank, size)
    where: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_cuda else "gloo", **where)
    yield _connected()
    # After an error the others may be gone, and taking leave of them would wait for ever.
    dist.destroy_process_group()


def _connected() -> Ranks:
    host = dist.new_group(backend="gloo")
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=_local_rank(), host=host)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
