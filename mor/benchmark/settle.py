"""What mean depth to ask for, so that what is generated has the one that is wanted.

Thresholds are calibrated on given tokens; what a model generates goes deeper or less deep, most of all with random
weights. So the depth is looked for where it will be measured: in the engine, on the requests at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mor.benchmark.arms import Arm
from mor.benchmark.serving import serve
from mor.benchmark.workload import Workload
from mor.engine.engine import Engine

TOLERANCE = 0.01
NARROWING = 6
"""Tries that narrow down where to ask; chance in a few tokens may mislead them."""
AROUND = (0.02, -0.02, 0.04, -0.04, 0.07, -0.07, 0.1, -0.1, 0.15, -0.15)
"""Those after them are so far from the closest one."""
TRIES = NARROWING + len(AROUND)


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What to ask for, and the mean depth generated when that was tried; `tries` of them were needed."""

    asked: float
    generated: float
    wanted: float
    tries: int

    @property
    def is_close(self) -> bool:
        """Whether what was generated is as wanted, to 1%."""
        return abs(self.generated - self.wanted) <= TOLERANCE * self.wanted

    def __str__(self) -> str:
        found = f"asked {self.asked:.4f} for {self.wanted:g}: {self.generated:.3f} generated, {self.tries} tries"
        return found if self.is_close else f"{found}; not within {TOLERANCE:.0%}"


def settle(generated: Callable[[float], float], wanted: float, *, bounds: tuple[float, float]) -> Settled:
    """What to ask within `bounds`, so that `generated` of it is `wanted` to 1%, or the closest of all tries.

    `generated` rises with what is asked, but for the chance in a few tokens. Each try is where a line through the
    nearest tries on both sides has it, every third one halfway between them, so that both sides move; at the bounds
    every token takes one recursion, or all. If that does not end it, the rest are around the closest. Deterministic if
    `generated` is.
    """
    tried = list[Settled]()

    def attempt(asked: float) -> Settled:
        found = Settled(asked=asked, generated=generated(asked), wanted=wanted, tries=len(tried) + 1)
        tried.append(found)
        return found

    def closest() -> Settled:
        return min(tried, key=lambda found: abs(found.generated - wanted))

    (low, low_depth), (high, high_depth) = ((bound, bound) for bound in bounds)
    asked = min(max(wanted, low), high)
    for number in range(1, NARROWING + 1):
        found = attempt(asked)
        if found.is_close:
            return found
        if found.generated < wanted:
            low, low_depth = asked, found.generated
        else:
            high, high_depth = asked, found.generated
        share = 0.5
        if number % 3 and low_depth < wanted < high_depth:
            share = min(0.95, max(0.05, (wanted - low_depth) / (high_depth - low_depth)))
        asked = low + share * (high - low)
    center = closest().asked
    for step in AROUND:
        if closest().is_close:
            break
        attempt(min(max(center + step, bounds[0]), bounds[1]))
    return replace(closest(), tries=len(tried))


def bounds_of(arm: Arm) -> tuple[float, float]:
    """The least and the greatest mean depth that can be asked of an arm."""
    router = arm.model.model.recursion.router
    assert router is not None
    depths = router.calibration_mean_depth
    return float(depths[0]), float(depths[-1])


def settle_workload(arm: Arm, engine: Engine, workload: Workload, *, most_tokens: int, temperature: float) -> Settled:
    """`settle` on the first requests of a workload that generate at most `most_tokens` together, or on its first."""
    assert arm.wanted_depth is not None
    count, tokens = 0, 0
    for length in workload.lengths:
        tokens += length
        if count and tokens > most_tokens:
            break
        count += 1
    part = workload.first(count)

    def generated(asked: float) -> float:
        depth = serve(engine, part, mean_depth=asked, temperature=temperature).mean_depth
        assert depth is not None
        return depth

    return settle(generated, arm.wanted_depth, bounds=bounds_of(arm))
