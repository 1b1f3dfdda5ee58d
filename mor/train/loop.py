"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.files import new_folder, write_json
from mor.model.cost import count_parameters
from mor.quiet import without_progress_bars
from mor.train import checkpoint, sharded_checkpoint
from mor.train.checkpoint_writer import CheckpointWriter
from mor.train.interrupt import Interrupt
from mor.train.options import RunOptions
from mor.train.pace import Pace, training_flops_per_token
from mor.train.progress import ProgressReporter, SilentProgress, progress_for
from mor.train.ranks import Ranks, Vote, join, was_restarted
from mor.train.run_folder import RunFolder
from mor.train.schedule import build_schedule
from mor.train.setup import build_run, default_budget
from mor.train.sharded_tensor import local_rows
from mor.train.spikes import SpikeError, describe, find_spikes
from mor.train.state import TrainingState
from mor.train.step import optimizer_step
from mor.train.step_graph import choose_run
from mor.train.trackers import Tracker, check_trackers, open_trackers
from mor.train.validation import Validator


class NonFiniteLossError(FloatingPointError):
    """Training met a loss or gradient that is not a number; failure.json in the run folder says where."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    `folder`: the run folder; `model`: the finished model in it, None if interrupted. `signal`: what interrupted it, if
    it came to this process. `training` and `evaluation`: the
    last lines of metrics.jsonl of each kind, if there are any.
    """

    folder: Path
    step: int
    interrupted: bool
    model: Path | None
    training: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    signal: int | None = None


def train(options: RunOptions, *, resume: bool = False, progress: ProgressReporter | None = None) -> TrainResult:
    """Train the model that `options` describe into the folder `options.output`.

    Processes that torchrun started train it together, with the same result up to rounding; the first alone writes
    metrics and shows progress. Started again by torchrun after one was lost, they resume.

    With `resume`, go on from the newest undamaged checkpoint there, with the same options; on a CPU the run then ends
    bit for bit as if it had never stopped. Without a checkpoint to resume it starts anew, with a warning. SIGTERM and
    SIGINT finish the step, write a checkpoint and return `interrupted=True`.

    Raises ValueError for options that do not fit, CheckpointError when checkpoints cannot be written or read,
    NonFiniteLossError when training diverges, and SpikeError at a spike if `stop_at_spike`.
    """
    with join(options.training.device) as ranks:
        return _train(options, resume or was_restarted(), progress, ranks)


def _train(options: RunOptions, resume: bool, progress: ProgressReporter | None, ranks: Ranks) -> TrainResult:
    folder = RunFolder(options.output)
    ranks.first(partial(check_trackers, options.training.trackers))
    found = _find_checkpoint(folder, resume, ranks)
    state, validator = build_run(options, found, ranks=ranks)
    ranks.first(lambda: _claim(folder, state))
    if not ranks.is_first:
        progress = SilentProgress()
    elif progress is None:
        progress = progress_for()
    if found is not None:
        progress.note(f"resuming from {found.folder}")
    trackers: list[Tracker] = []
    ranks.first(lambda: trackers.extend(open_trackers(options, folder.path, state.step)))
    trainer = Trainer(state=state, validator=validator, folder=folder, progress=progress, trackers=trackers)
    try:
        return trainer.run()
    finally:
        for tracker in trackers:
            tracker.close()


def _claim(folder: RunFolder, state: TrainingState) -> None:
    folder.claim(state.options)
    folder.journal.rewind(state.step)
    folder.spikes.rewind(state.judged)


def _find_checkpoint(folder: RunFolder, resume: bool, ranks: Ranks) -> checkpoint.Checkpoint | None:
    if not resume:
        ranks.first(folder.refuse_occupied)
        return None
    found = checkpoint.read_latest(folder.checkpoints, ranks)
    if found is None and ranks.is_first:
        warnings.warn(f"no checkpoint in {folder.path} to resume: starting at step 0", stacklevel=4)
    return found


def _absolute_sum(tensor: Tensor) -> float:
    return float(tensor.abs().sum())


class Trainer:
    """Takes a state to its last step."""

    def __init__(
        self,
        *,
        state: TrainingState,
        validator: Validator,
        folder: RunFolder,
        progress: ProgressReporter,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._state, self._validator, self._folder, self._progress = state, validator, folder, progress
        self._trackers = trackers
        self._options = state.options.training
        self._schedule = build_schedule(state.options)
        self._ranks = state.parallel.ranks
        self._checkpoints = CheckpointWriter(
            folder.checkpoints,
            state.parallel,
            keep=self._options.keep_checkpoints,
            asynchronous=self._options.asynchronous_checkpoints,
        )
        self._saved_step = state.step or None
        self._run = choose_run(state, progress.note)
        self._pace = Pace(state.device, state.dtype, self._ranks)

    def run(self) -> TrainResult:
        """Train to the end, or until interrupted."""
        state, steps = self._state, self._options.steps
        state.model.train()
        self._progress.start(steps=steps, step=state.step)
        vote = Vote(self._ranks)
        try:
            with Interrupt() as interrupt:
                while state.step < steps and not vote.ask(interrupt.requested):
                    self._step()
                vote.close()
                if state.step < steps:
                    self._check_before_leaving()
                    self._save()
                    self._checkpoints.wait()
                    return self._result(interrupted=True, signal=interrupt.number)
            self._checkpoints.wait()
            self._finish()
        finally:
            self._progress.close()
        return self._result(interrupted=False)

    def _step(self) -> None:
        state = self._state
        start = time.perf_counter()
        rate = state.options.optimizer.learning_rate * self._schedule.factor(state.step)
        optimizer_step(state, rate, self._run)
        is_last = state.step == self._options.steps
        logs = is_last or state.step % self._options.log_interval == 0
        evaluates = is_last or self._is_due(self._options.evaluation_interval)
        saves = is_last or self._is_due(self._options.checkpoint_interval)
        if logs or evaluates or saves:
            self._check_measurements()  # waits for the device, so the time below is the step's
        elapsed = time.perf_counter() - start
        self._pace.add(elapsed, self._options.tokens_per_step)
        state.seconds += elapsed
        if evaluates or saves:
            self._check_weights()
        if logs:
            self._log(rate)
        if evaluates:
            self._evaluate(is_last)
        if saves:
            self._save()
        self._progress.advance(state.step)

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self._state.step % interval == 0

    def _check_before_leaving(self) -> None:
        if self._state.positions:
            self._check_measurements()
            self._check_weights()

    def _check_measurements(self) -> None:
        """Fail at the first step since the last log line with a loss or gradient norm that is not finite; note spikes,
        and fail at the first if told to."""
        series = self._state.window.values()
        bad = [(i, name) for name, values in series.items() for i, v in enumerate(values) if not math.isfinite(v)]
        if bad:
            index, name = min(bad)
            values = {key: values[index] for key, values in series.items()}
            self._fail(name, self._state.step - len(self._state.positions) + index + 1, values)
        spikes = find_spikes(self._state, series)
        if spikes:
            self._note_spikes(spikes)

    def _note_spikes(self, spikes: list[dict[str, Any]]) -> None:
        if self._ranks.is_first:
            for spike in spikes:
                self._folder.spikes.write(spike)
            self._progress.note(f"spike: {describe(spikes)}; see {self._folder.spikes.path}")
        if self._options.stop_at_spike:
            first = spikes[0]
            saved = self._write_failure(first["step"], {first["name"]: first["value"]}, first["data_position"])
            raise SpikeError(f"{describe(spikes)}; {saved}; see {self._folder.failure}")

    def _check_weights(self) -> None:
        """Fail if the last update left a weight that is not finite: such weights are not worth a checkpoint."""
        weights = {name: local_rows(parameter.detach()) for name, parameter in self._state.model.named_parameters()}
        broken = torch.stack([(~weight.isfinite()).any() for weight in weights.values()])
        for name, is_broken in zip(weights, self._ranks.sum(broken.int()).tolist()):
            if is_broken:
                size = sum(self._ranks.each(partial(_absolute_sum, weights[name])))
                self._fail(name, self._state.step, {name: size})

    def _fail(self, name: str, step: int, values: dict[str, float]) -> None:
        """Write failure.json and raise NonFiniteLossError. `step` counts from 1."""
        position = self._state.positions[step - self._state.step - 1]
        saved = self._write_failure(step, values, position)
        raise NonFiniteLossError(
            f"{name} is {values[name]} at step {step}, whose data begins at {position}; {saved}; "
            f"see {self._folder.failure}"
        )

    def _write_failure(self, step: int, values: dict[str, float], position: dict[str, Any]) -> str:
        """Write failure.json; which checkpoint is left, in words."""
        self._checkpoints.wait()
        failure = {
            "step": step,
            "values": {key: value if math.isfinite(value) else str(value) for key, value in values.items()},
            "data_position": position,
            "last_checkpoint": self._saved_step,
        }
        self._ranks.first(lambda: write_json(self._folder.failure, failure))
        return "there is no checkpoint" if self._saved_step is None else f"last checkpoint: step {self._saved_step}"

    def _log(self, learning_rate: float) -> None:
        state = self._state
        state.window.collect(self._ranks)
        peak_memory = self._pace.peak_memory_gib()
        if self._ranks.is_first:
            self._record_training(learning_rate, peak_memory)
        state.window.clear()
        state.positions.clear()
        self._pace.clear()

    def _record_training(self, learning_rate: float, peak_memory: float) -> None:
        state = self._state
        summary, config = state.window.summary(), state.model.config
        flops = training_flops_per_token(config, self._options.sequence_length, summary["capacities"])
        state.flops += flops * len(state.window) * self._options.tokens_per_step
        losses = {k.removeprefix("loss/"): summary.pop(k) for k in list(summary) if k.startswith("loss/")}
        state.last_training = {
            "kind": "training",
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.epoch,
            "loss": summary.pop("loss"),
            "losses": losses,
            "learning_rate": learning_rate,
            **summary,
            "spikes": state.spikes,
            "flops": state.flops,
            **self._pace.speed(flops),
            "peak_memory_gib": peak_memory,
            "seconds": state.seconds,
        }
        self._write(state.last_training)

    def _evaluate(self, is_last: bool) -> None:
        state = self._state
        decisions = self._validator.finish(state.model) if is_last else self._validator.evaluate(state.model)
        if not decisions:
            return
        state.last_evaluation = {
            "kind": "evaluation",
            "step": state.step,
            "tokens": state.tokens,
            "decisions": decisions,
        }
        self._write(state.last_evaluation)

    def _write(self, record: dict[str, Any]) -> None:
        if self._ranks.is_first:
            self._folder.journal.write(record)
            self._progress.record(record)
            for tracker in self._trackers:
                tracker.record(record)

    def _save(self) -> None:
        state = self._state
        if self._saved_step == state.step:
            return
        if self._ranks.is_first:
            self._folder.journal.sync()
            self._folder.spikes.sync()
        self._checkpoints.save(state)
        self._saved_step = state.step

    def _finish(self) -> None:
        """Write the finished model with its tokenizer, and summary.json."""
        state = self._state
        state.model.config.mean_depth = default_budget(state.options, state.model)
        if state.parallel.is_sharded:
            sharded_checkpoint.export(self._folder.final, state.model, state.tokenizer, self._ranks)
        else:
            self._ranks.first(self._export)
        self._ranks.first(self._write_summary)

    def _export(self) -> None:
        with new_folder(self._folder.final, replace=True) as partial, without_progress_bars():
            self._state.model.save_pretrained(partial)
            self._state.tokenizer.save_pretrained(partial)

    def _write_summary(self) -> None:
        state = self._state
        count = count_parameters(state.model.config)
        write_json(
            self._folder.summary,
            {
                "steps": state.step,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "unique_parameters": count.total,
                "training": state.last_training,
                "evaluation": state.last_evaluation,
            },
        )

    def _result(self, *, interrupted: bool, signal: int | None = None) -> TrainResult:
        return TrainResult(
            folder=self._folder.path,
            step=self._state.step,
            interrupted=interrupted,
            model=None if interrupted else self._folder.final,
            training=self._state.last_training,
            evaluation=self._state.last_evaluation,
            signal=signal,
        )
