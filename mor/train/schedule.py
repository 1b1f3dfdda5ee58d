"""Learning-rate schedules: the share of the peak learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from mor.train.options import RunOptions


class Schedule(Protocol):
    """Maps a step to a factor in [0, 1] on the peak learning rate."""

    def factor(self, step: int) -> float:
        """The factor for optimizer step `step`, counted from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trapezoid:
    """Linear warm-up, plateau, linear decay to 0 (arXiv 2507.10524, section 3; w, p, d = warm-up, decay start, decay).

    t/w for t < w; 1 for w <= t < p; 1 - (t-p)/d for p <= t < p+d; 0 after.
    """

    warmup_steps: int
    decay_start: int
    decay_steps: int

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step < self.decay_start:
            return 1.0
        if step < self.decay_start + self.decay_steps:
            return 1.0 - (step - self.decay_start) / self.decay_steps
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 down to `minimum_ratio` at step `steps`, where it stays."""

    warmup_steps: int
    steps: int
    minimum_ratio: float

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.minimum_ratio + (1 - self.minimum_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(options: RunOptions) -> Schedule:
    """The schedule a run asks for, laid over its steps."""
    steps, warmup = options.training.steps, options.warmup_steps
    if options.schedule.kind == "cosine":
        return Cosine(warmup_steps=warmup, steps=steps, minimum_ratio=options.schedule.minimum_ratio)
    decay = options.decay_steps
    return Trapezoid(warmup_steps=warmup, decay_start=steps - decay, decay_steps=decay)
