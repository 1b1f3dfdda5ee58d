"""What one process of several does in a test. As a program: die once, see `die_once`."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mor.config import from_dict
from mor.train import sharded_checkpoint
from mor.train.checkpoint import CheckpointError
from mor.train.loop import train
from mor.train.options import RunOptions
from mor.train.progress import SilentProgress
from mor.train.ranks import OtherRankError, Vote, join, was_restarted
from mor.train.setup import build_run
from mor.train.sharded_tensor import gather_to, row_range
from mor.train.step import optimizer_step


def run(*runs: RunOptions) -> None:
    """Train each, one after the other."""
    with join(runs[0].training.device):
        for options in runs:
            train(options, progress=SilentProgress())


def resume(*runs: RunOptions) -> None:
    """Go on with each."""
    with join("cpu"):
        for options in runs:
            train(options, resume=True, progress=SilentProgress())


def interrupt(*runs: RunOptions) -> None:
    """The last rank alone gets SIGTERM, while it takes its sixth step."""
    with join("cpu") as ranks:
        for options in runs:
            if ranks.rank == ranks.size - 1:
                act_at_step(6, lambda: signal.raise_signal(signal.SIGTERM))
            result = train(options, progress=SilentProgress())
            assert (result.interrupted, result.step) == (True, 7), result


def fill_disk(options: RunOptions) -> str:
    """The last rank cannot write its part of the second checkpoint; returns what the error says."""
    original, count = sharded_checkpoint.save_file, itertools.count(1)

    def save(tensors: dict[str, torch.Tensor], path: Path, **settings: Any) -> None:
        if next(count) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(tensors, path, **settings)

    with join("cpu") as ranks:
        if ranks.rank == ranks.size - 1:
            sharded_checkpoint.save_file = save
        with pytest.raises(CheckpointError) as failure:
            train(options, progress=SilentProgress())
    return str(failure.value)


def act_at_step(number: int, action: Callable[[], None]) -> None:
    """Let `action` happen before the optimizer's step `number`, counted from 1."""
    original, count = torch.optim.AdamW.step, itertools.count(1)

    def step(self: torch.optim.AdamW) -> None:
        if next(count) == number:
            action()
        original(self)

    torch.optim.AdamW.step = step  # type: ignore[assignment, method-assign]


def die_once(options: RunOptions) -> None:
    """The last rank dies in its first life's sixth step."""
    if not was_restarted() and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        act_at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(options, progress=SilentProgress())


def gathers(*runs: RunOptions) -> list[dict[str, Any]]:
    """What one step of each run gathers, by unit and in all; and how many storages the weights have."""
    from torch.profiler import ProfilerActivity, profile

    found = []
    with join("cpu") as ranks:
        for options in runs:
            state, _ = build_run(options, ranks=ranks)
            state.model.train()
            optimizer_step(state, 1e-3)
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                optimizer_step(state, 1e-3)
            names = [event.name for event in trace.events()]
            storages = {p.to_local().untyped_storage().data_ptr() for p in state.model.parameters() if p.numel() > 40}
            found.append(
                {
                    "named": {name: names.count(name) for name in names if name.startswith("FSDP::all_gather (")},
                    "all": names.count("c10d::_allgather_base_"),
                    "tied": state.model.lm_head.weight is state.model.model.embed_tokens.weight,
                    "storages": len(storages),
                }
            )
    return found


def agree() -> None:
    """Ranks share values and errors, and tensors come together and apart again."""
    with join("cpu") as ranks:
        assert ranks.first(lambda: f"from {ranks.rank}") == "from 0"
        assert ranks.each(lambda: ranks.rank) == list(range(ranks.size))
        assert float(ranks.sum(torch.tensor(float(ranks.rank + 1)))) == sum(range(1, ranks.size + 1))
        for method in (ranks.first, ranks.each):
            expected = ZeroDivisionError if ranks.is_first else OtherRankError
            with pytest.raises(expected, match=r"division|modulo"):
                method(lambda: 1 // ranks.rank)
        vote = Vote(ranks)
        assert [vote.ask(ranks.rank == 1), vote.ask(False), vote.ask(False), vote.close()] == [
            False,
            True,
            False,
            False,
        ]
        _tensors(ranks.rank, ranks.size)


def _tensors(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    for length in (1, 2, 3, 7):
        whole = torch.arange(length * 2.0).view(length, 2)
        spread = distribute_tensor(whole, mesh, [Shard(0)])
        assert isinstance(spread, DTensor)
        start, stop = row_range(spread)
        assert torch.equal(whole[start:stop], spread.to_local())
        for owner in range(size):
            gathered = gather_to(spread, owner)
            assert (gathered is None) == (owner != rank)
            assert gathered is None or torch.equal(gathered, whole)


if __name__ == "__main__":
    die_once(from_dict(RunOptions, json.loads(sys.argv[1])))
