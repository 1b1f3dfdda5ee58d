"""The stored results of a study, summed up over seeds: what every table and figure is made of."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.files import write_text
from mor.study.grid import Study
from mor.study.places import RESULT, RUNS

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over seeds, the standard deviation between seeds (nan for one), and their number."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("a spread needs a value at least")
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(mean=statistics.fmean(values), deviation=deviation, count=len(values))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.count)


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """An arm at a budget. `difference`: NLL less the baseline's of the same seed; None for the baseline itself, and
    where no seed has both. `gap`: causal less `top_k` NLL, None without `top_k`."""

    arm: str
    budget: str
    nll: Spread
    bits_per_byte: Spread
    mean_depth: Spread
    difference: Spread | None
    gap: Spread | None
    tokens: float
    training_flops: float
    flops_per_token: float
    non_embedding: int
    seconds: Spread


def read_results(study: Study, out: Path) -> list[Result]:
    """The results there are, in the order of the grid, each with the arm, the budget and the seed of its cell.

    `out`: the folder of studies, or a file of JSON lines as `export_results` writes it.
    """
    stored = _stored(out)
    return [
        {**result, "arm": run.arm, "budget": run.budget, "seed": run.seed}
        for run in study.runs
        if (result := stored(run.key)) is not None
    ]


def _stored(out: Path) -> Callable[[str], Result | None]:
    if out.is_file():
        results = {r["key"]: r for r in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
        return results.get
    return functools.cache(functools.partial(_read, out / RUNS))


def _read(folder: Path, key: str) -> Result | None:
    path = folder / key / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def stored_vocabulary(out: Path) -> int | None:
    """The vocabulary that the stored results are of; None where there are none."""
    if out.is_file():
        lines = out.read_text(encoding="utf-8").splitlines()[:1]
    else:
        lines = [path.read_text(encoding="utf-8") for path in sorted((out / RUNS).glob(f"*/{RESULT}"))[:1]]
    return int(json.loads(lines[0])["options"]["model"]["vocab_size"]) if lines else None


def export_results(out: Path, file: Path) -> int:
    """Write all results in the folder of studies `out` as JSON lines, for a repository; how many there were."""
    found = sorted((out / RUNS).glob(f"*/{RESULT}"))
    lines = [json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":")) for path in found]
    write_text(file, "".join(line + "\n" for line in lines))
    return len(lines)


def summarise(study: Study, results: Sequence[Result]) -> list[ArmSummary]:
    """One summary per arm and budget that have results, budgets first."""
    budgets, summaries = list(dict.fromkeys(run.budget for run in study.runs)), []
    for budget in budgets:
        here = [result for result in results if result["budget"] == budget]
        baseline = {r["seed"]: own(r)["nll"] for r in here if r["arm"] == study.baseline}
        for arm in study.arms:
            group = [result for result in here if result["arm"] == arm]
            if group:
                summaries.append(_summary(study, arm, budget, group, baseline))
    return summaries


def own(result: Result) -> dict[str, Any]:
    """The evaluation at the model's own budget."""
    quality: dict[str, Any] = result["own"]
    return quality


def _summary(study: Study, arm: str, budget: str, group: Sequence[Result], baseline: dict[int, float]) -> ArmSummary:
    quality = [own(result) for result in group]
    paired = [q["nll"] - baseline[r["seed"]] for q, r in zip(quality, group, strict=True) if r["seed"] in baseline]
    gaps = [q["gap"]["nll"] for q in quality if q["gap"] is not None]
    return ArmSummary(
        arm=arm,
        budget=budget,
        nll=Spread.of([q["nll"] for q in quality]),
        bits_per_byte=Spread.of([q["bits_per_byte"] for q in quality]),
        mean_depth=Spread.of([q["mean_depth"] for q in quality]),
        difference=Spread.of(paired) if paired and arm != study.baseline else None,
        gap=Spread.of(gaps) if gaps else None,
        tokens=statistics.fmean(r["training"]["tokens"] for r in group),
        training_flops=statistics.fmean(r["training"]["flops"] for r in group),
        flops_per_token=statistics.fmean(q["flops_per_token"] for q in quality),
        non_embedding=group[0]["parameters"]["non_embedding"],
        seconds=Spread.of([r["training"]["seconds"] for r in group]),
    )
