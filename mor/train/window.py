"""Measurements of the steps since the last log line, kept on the device until they are read.

Reading waits for the device once per log interval, not once per step. An unfinished window is part of a checkpoint, so
that a resumed run writes the same lines.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mor.model.configuration_mor import MorConfig
from mor.model.routing import RecursionTrace
from mor.train import metrics
from mor.train.ranks import Ranks


class Window:
    """Per-step values (losses, norms) and running counts (depths, predictions, visits) of a log interval."""

    def __init__(self, config: MorConfig) -> None:
        self._config = config
        self._values: dict[str, list[Tensor]] = {}
        self._counts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return max(map(len, self._values.values()), default=0)

    def add_step(self, values: dict[str, Tensor]) -> None:
        """Add one optimizer step's 0-d values."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def add_forward(self, depths_BT: Tensor, routing: tuple[RecursionTrace, ...]) -> None:
        """Add what the router did in one forward."""
        size = self._config.num_recursions
        self._count("depths", metrics.depth_counts(depths_BT, size))
        if self._config.router != "none":
            self._count("visits", metrics.visited_positions(depths_BT, size))
        if self._config.router == "expert_choice" and routing:
            boundary = metrics.sampling_boundary(self._config.router_activation, self._config.causal_method)
            counts = [metrics.sampling_counts(trace, boundary) for trace in routing]
            self._count("sampling", torch.stack(counts))

    def add_copy(self, other: Window) -> None:
        """Add what `other` measured, in tensors of its own."""
        for name, values in other._values.items():
            self._values.setdefault(name, []).extend(value.clone() for value in values)
        for name, count in other._counts.items():
            self._count(name, count)

    def _count(self, name: str, count: Tensor) -> None:
        self._counts[name] = self._counts[name] + count if name in self._counts else count.clone()

    def values(self) -> dict[str, list[float]]:
        """Each named value, step by step, in an order that survives `state_dict`."""
        names = sorted(self._values)
        steps = [value for name in names for value in self._values[name]]
        found = iter(torch.stack(steps).tolist() if steps else [])  # one copy: each waits for the device
        return {name: list(islice(found, len(self._values[name]))) for name in names}

    def summary(self) -> dict[str, Any]:
        """Means of the values; the router's measures over all tokens of the window."""
        record: dict[str, Any] = {name: math.fsum(steps) / len(steps) for name, steps in self.values().items()}
        if "depths" in self._counts:
            record |= self._depth_summary(self._counts["depths"].tolist())
        if "visits" in self._counts:
            record["dead_token_ratio"] = metrics.dead_token_ratio(self._counts["visits"].tolist())
        if "sampling" in self._counts:
            record["sampling_accuracy"] = metrics.sampling_accuracy(self._counts["sampling"].tolist())
        return record

    def _depth_summary(self, counts: list[int]) -> dict[str, Any]:
        load, total = metrics.depth_load(counts), sum(counts)
        record: dict[str, Any] = {
            "mean_depth": metrics.mean_depth(counts),
            "depth_histogram": [count / total for count in counts],
            "capacities": metrics.active_shares(counts),
        }
        if self._config.router != "none":
            record |= {"max_violation": metrics.max_violation(load), "router_entropy": metrics.load_entropy(load)}
        return record

    def collect(self, ranks: Ranks) -> None:
        """Bring the counts of all ranks together on the first; the others begin anew. Values are alike on all."""
        if ranks.size == 1:
            return
        for name in sorted(self._counts):
            total = ranks.sum(self._counts[name])
            self._counts[name] = total
        if not ranks.is_first:
            self.clear_counts()

    def clear_counts(self) -> None:
        """Set the counts to 0."""
        self._counts = {name: torch.zeros_like(count) for name, count in self._counts.items()}

    def clear(self) -> None:
        """Start the next log interval."""
        self._values, self._counts = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """All measurements as tensors."""
        values = {f"values/{name}": torch.stack(steps) for name, steps in self._values.items()}
        return values | {f"counts/{name}": count for name, count in self._counts.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from `state_dict`."""
        self.clear()
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind == "values":
                self._values[name] = list(tensor.to(device).unbind())
            else:
                self._counts[name] = tensor.to(device)
