"""Where else a run's measurements go besides metrics.jsonl: TensorBoard, Weights & Biases.

A tracker is told every line that metrics.jsonl gets, on the first rank. Names are flat: `training/loss`,
`training/losses/lm`, `training/capacities/1` (of recursion 1), `evaluation/causal/bits_per_byte`; the share of tokens
at each depth is `training/depth_histogram/0`, ..., and a histogram `training/depths` besides.

After a resume nothing counts twice. TensorBoard is told to forget what came after the step that training goes on from.
Weights & Biases goes on with the same run, whose id is kept in wandb.json of the run folder; it keeps the first of two
values for one step, and those that a resumed run writes again are the same.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mor.config import to_dict
from mor.files import write_json
from mor.train import random_state
from mor.train.options import RunOptions, TrackerName

MODULES: dict[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    "wandb": ("wandb",),
}
FROM_ZERO = ("depth_histogram",)  # lists whose first entry is number 0; others count recursions from 1


class Tracker(Protocol):
    """Told by the loop what metrics.jsonl is told. `close` comes last, whatever went wrong."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""
        ...

    def close(self) -> None:
        """Training ended; hand over what waits."""
        ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """ImportError naming the extra of the first of `names` that is not installed."""
    for name in names:
        try:
            for module in MODULES[name]:
                importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"training.trackers={name!r} needs {name}: pip install 'mor[{name}]'") from error


def open_trackers(options: RunOptions, folder: Path, step: int) -> list[Tracker]:
    """The trackers that `options` name, for a run in `folder` that has taken `step` steps.

    Random generators are left as they were, whatever the libraries draw.
    """
    tensors, values = random_state.capture()
    made = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    trackers: list[Tracker] = [made[name](options, folder, step) for name in options.training.trackers]
    random_state.restore(tensors, values)
    return trackers


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their flat names; `step` and `kind` are left out."""
    numbers = {key: value for key, value in record.items() if key not in ("kind", "step")}
    return dict(_flat(numbers.pop("decisions", numbers), record["kind"]))


def _flat(values: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}/{key}")
    elif isinstance(values, list):
        first = 0 if name.endswith(FROM_ZERO) else 1
        for number, value in enumerate(values, start=first):
            yield f"{name}/{number}", value
    else:
        yield name, values


class TensorBoard:
    """Event files in `tensorboard/` of the run folder, for `tensorboard --logdir`."""

    def __init__(self, options: RunOptions, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("options", f"```json\n{json.dumps(to_dict(options), indent=2)}\n```", step)

    def record(self, record: dict[str, Any]) -> None:
        for name, value in flatten(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if "depth_histogram" in record:
            self._add_depths(record["depth_histogram"], record["step"])
        self._writer.flush()

    def _add_depths(self, shares: Sequence[float], step: int) -> None:
        """A histogram with a bar around every depth."""
        self._writer.add_histogram_raw(
            "training/depths",
            min=-0.5,
            max=len(shares) - 0.5,
            num=1,
            sum=sum(depth * share for depth, share in enumerate(shares)),
            sum_squares=sum(depth**2 * share for depth, share in enumerate(shares)),
            bucket_limits=[depth + 0.5 for depth in range(len(shares))],
            bucket_counts=list(shares),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project `mor`, named after the run folder; its settings come from wandb's own environment variables,
    such as WANDB_PROJECT and WANDB_MODE=offline."""

    def __init__(self, options: RunOptions, folder: Path, step: int) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mor"),
            name=folder.resolve().name,
            id=_run_id(folder / "wandb.json", is_new=step == 0),
            resume="allow",
            dir=str(folder),
            config=to_dict(options),
        )

    def record(self, record: dict[str, Any]) -> None:
        numbers: dict[str, Any] = dict(flatten(record))
        if "depth_histogram" in record:
            shares = record["depth_histogram"]
            edges = [depth - 0.5 for depth in range(len(shares) + 1)]
            numbers["training/depths"] = self._wandb.Histogram(np_histogram=(shares, edges))
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, *, is_new: bool) -> str:
    """The id in `path`; a run that begins, be it for a second time, gets a new one."""
    if not is_new:
        with suppress(FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))["id"]
    made = secrets.token_hex(4)
    write_json(path, {"id": made})
    return made
