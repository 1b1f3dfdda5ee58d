"""The folder of a run, and whether a run may start or go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor.config import to_dict
from mor.files import remove_leftovers, write_json
from mor.train.journal import Journal
from mor.train.options import RunOptions

MAY_CHANGE = frozenset(
    "output data.path data.verify training.device training.checkpoint_interval training.keep_checkpoints "
    "training.asynchronous_checkpoints training.parallel training.reshard_after_forward training.spike_threshold "
    "training.stop_at_spike training.trackers training.shard_size training.cuda_graph".split()
)


class RunFolder:
    """Paths inside a run's folder: options.json, metrics.jsonl, spikes.jsonl, checkpoints/, final/, summary.json and
    failure.json."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.options = self.path / "options.json"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.summary = self.path / "summary.json"
        self.failure = self.path / "failure.json"
        self.journal = Journal(self.path / "metrics.jsonl")
        self.spikes = Journal(self.path / "spikes.jsonl")

    def claim(self, options: RunOptions) -> None:
        """Make the folder and write the options, clearing what an earlier process left by failing or being killed."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        self.failure.unlink(missing_ok=True)
        write_json(self.options, to_dict(options))

    def refuse_occupied(self) -> None:
        """ValueError if there is a run in it already."""
        if self.options.exists():
            raise ValueError(f"{self.path} already holds a run; resume it, or choose another output")


def check_same_options(before: Mapping[str, Any], now: RunOptions) -> None:
    """ValueError naming the first option that differs from the resumed run's and is not in `MAY_CHANGE`."""
    old, new = flat_options(before), flat_options(json.loads(json.dumps(to_dict(now))))
    for key in sorted(old.keys() | new.keys()):
        if key not in MAY_CHANGE and old.get(key) != new.get(key):
            raise ValueError(
                f"cannot resume: option {key!r} was {old.get(key)!r} and is now {new.get(key)!r}; "
                "put it back, or start a new run"
            )


def flat_options(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= flat_options(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
