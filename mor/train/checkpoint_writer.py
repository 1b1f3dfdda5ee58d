"""Who writes a run's checkpoints: the training itself, or a thread beside it from copies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mor.train import checkpoint, sharded_checkpoint
from mor.train.checkpoint import CheckpointError
from mor.train.parallel import Parallel
from mor.train.ranks import OtherRankError
from mor.train.sharded_checkpoint import Staged, model_tensors, on_host, stage
from mor.train.state import TrainingState


class CheckpointWriter:
    """Writes checkpoints into `folder`, one at a time; all ranks must call its methods.

    With `asynchronous`, `save` returns when the state is copied to the host; an error shows at the next call.
    """

    def __init__(self, folder: Path, parallel: Parallel, *, keep: int, asynchronous: bool) -> None:
        self._folder, self._keep = folder, keep
        self._is_sharded = parallel.is_sharded
        self._ranks = parallel.ranks.with_own_group() if asynchronous else parallel.ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[Any] | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of `state`. CheckpointError when it, or the one before it, could not be written."""
        self.wait()
        write = self._sharded(state) if self._is_sharded else self._whole(state)
        if self._thread is None:
            write()
        else:
            self._pending = self._thread.submit(write)

    def wait(self) -> None:
        """Until nothing is being written. CheckpointError when what was could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _whole(self, state: TrainingState) -> Callable[[], None]:
        model, step, values = state.model, state.step, state.values()
        tensors, weights = state.tensors(), None
        if self._thread is not None and self._ranks.is_first:
            tensors, weights = on_host(tensors), on_host(model_tensors(model))

        def write() -> None:
            checkpoint.save(
                self._folder, step, model=model, tensors=tensors, values=values, keep=self._keep, weights=weights
            )

        def write_once() -> None:
            try:
                self._ranks.first(write)
            except OtherRankError as error:
                raise CheckpointError(str(error)) from error

        return write_once

    def _sharded(self, state: TrainingState) -> Callable[[], None]:
        model, step, values = state.model, state.step, state.values()
        staged = Staged(weights=stage(model_tensors(model), self._ranks), tensors=stage(state.tensors(), self._ranks))

        def write() -> None:
            sharded_checkpoint.save(
                self._folder, step, model=model, staged=staged, values=values, keep=self._keep, ranks=self._ranks
            )

        return write
