"""Noticing a loss or a gradient norm that leaps above those of the steps before it.

A value is a spike when it exceeds median + threshold * deviation of the last steps. The deviation is 1.4826 times the
median absolute deviation, which of normal values is their standard deviation, and which spikes themselves hardly move.
It is taken as at least 1% of the median, so that a loss that hardly changes at all may still change a little.

Every step is judged by the steps before it alone, however many are judged at a time, so the result does not depend on
when a run looks at its measurements or was resumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mor.train.state import TrainingState

WATCHED = ("loss", "gradient_norm")
NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation
SMALLEST_DEVIATION = 0.01  # of the median
FEWEST_STEPS = 16  # that a step is compared with


class SpikeError(RuntimeError):
    """Training met a spike and was told to stop there; failure.json in the run folder says where."""


@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """`threshold`: deviations above the median; None: nothing is a spike. `window`: steps to compare with."""

    threshold: float | None
    window: int

    def limit(self, before: Sequence[float]) -> float | None:
        """The largest value that is none after `before`; None when these are too few to tell."""
        if self.threshold is None or len(before) < min(FEWEST_STEPS, self.window):
            return None
        median = statistics.median(before)
        deviation = NORMAL * statistics.median(abs(value - median) for value in before)
        return median + self.threshold * max(deviation, SMALLEST_DEVIATION * abs(median))


def find_spikes(state: TrainingState, series: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The spikes in the steps of the window that were not judged yet, as lines of spikes.jsonl; they then are.

    `series`: the window's values, finite all. A line holds the step, the name and value of what leapt, the median of
    the steps before and the limit, and the position in the data at which the step began to read.
    """
    options = state.options.training
    rule = SpikeRule(threshold=options.spike_threshold, window=options.spike_window)
    start, spikes = state.step - len(state.positions), []
    for step in range(state.judged + 1, state.step + 1):
        for name in WATCHED:
            before, value = state.recent.get(name, ()), series[name][step - start - 1]
            limit = rule.limit(before)
            if limit is not None and value > limit:
                figures = {"value": value, "median": statistics.median(before), "limit": limit}
                position = state.positions[step - start - 1]
                spikes.append({"step": step, "name": name, **figures, "data_position": position})
            state.recent = state.recent | {name: (*before, value)[-rule.window :]}
    state.judged, state.spikes = state.step, state.spikes + len(spikes)
    return spikes


def describe(spikes: Sequence[dict[str, Any]]) -> str:
    """The first of some spikes in a few words, and how many more there are."""
    first, more = spikes[0], f", and {len(spikes) - 1} more" if len(spikes) > 1 else ""
    name = first["name"].replace("_", " ")
    return f"{name} {first['value']:.4g} at step {first['step']}, where {first['median']:.4g} was usual{more}"
