"""The results of a study, summed up over seeds: what every table and figure is made of."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.study.grid import Study
from mor.study.places import RESULT, RUNS
from mor.study.studies import WIDTHS

Result = dict[str, Any]
VOCABULARY = 8192
SHUFFLED_SINCE = 4  # version of results that trained on rows in random order; before, on batches of neighbouring ones


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
class Findings:
    """A study and the results there are, each with the arm, the budget and the seed of its cell. `before`: results of
    the same cells, trained on rows in another order; they are compared with each other alone."""

    study: Study
    results: tuple[Result, ...]
    before: tuple[Result, ...] = ()

    @property
    def earlier(self) -> Findings:
        """What `before` alone says."""
        return Findings(study=self.study, results=self.before)

    @property
    def budgets(self) -> list[str]:
        """Those that have results, in the order of the grid."""
        there = {result["budget"] for result in self.results}
        return [budget for budget in dict.fromkeys(run.budget for run in self.study.runs) if budget in there]

    @property
    def last_budget(self) -> str:
        """The last of the grid, which is that of equal FLOPs where there are two."""
        return self.study.runs[-1].budget

    def of(self, arm: str, budget: str) -> list[Result]:
        """The results of an arm at a budget, one per seed."""
        return [result for result in self.results if (result["arm"], result["budget"]) == (arm, budget)]

    def of_shared_seeds(self, arms: Sequence[str], budget: str) -> dict[str, list[Result]]:
        """The results at a budget of those of `arms` that have any, of the seeds that all of these have: means over
        other seeds are means over other data. All their results where they share no seed."""
        groups = {arm: group for arm in arms if (group := self.of(arm, budget))}
        shared = set[int].intersection(*({r["seed"] for r in group} for group in groups.values())) if groups else set()
        if not shared:
            return groups
        return {arm: [result for result in group if result["seed"] in shared] for arm, group in groups.items()}

    def summaries(self) -> list[ArmSummary]:
        """One per arm and budget that have results, budgets first."""
        pairs = [(budget, arm) for budget in self.budgets for arm in self.study.arms]
        return [_summary(self, arm, budget) for budget, arm in pairs if self.of(arm, budget)]

    def baseline_of(self, arm: str) -> str:
        """What an arm is compared with: the vanilla model of its size where arms are named by sizes."""
        twin = f"vanilla-{arm.rpartition('-')[2]}"
        return twin if arm.rpartition("-")[2] in WIDTHS and twin in self.study.arms else self.study.baseline


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """An arm at a budget.

    `seeds`: those that are done. `difference`: NLL less the baseline's of the same seed; None for the baseline itself,
    and where no seed has both. `top_k`, `gap`, `gap_share`: NLL under `top_k`, and causal less `top_k` NLL in nats and
    as a share of the causal one; None without `top_k`.
    """

    arm: str
    budget: str
    seeds: tuple[int, ...]
    nll: Spread
    mean_depth: Spread
    difference: Spread | None
    top_k: Spread | None
    gap: Spread | None
    gap_share: Spread | None
    tokens: float
    flops_per_token: float
    kv_bytes_per_token: float
    non_embedding: int


def find_results(study: Study, out: Path) -> Findings:
    """The results in the folder of studies `out`."""
    read = functools.cache(functools.partial(_read, out / RUNS))
    return Findings(
        study=study,
        results=tuple(
            {**result, "arm": run.arm, "budget": run.budget, "seed": run.seed}
            for run in study.runs
            if (result := read(run.key)) is not None
        ),
    )


def _read(folder: Path, key: str) -> Result | None:
    path = folder / key / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def found_vocabulary(out: Path) -> int:
    """The vocabulary that the results in the folder of studies `out` are of."""
    paths = sorted((out / RUNS).glob(f"*/{RESULT}"))[:1]
    return vocabulary_of([json.loads(path.read_text(encoding="utf-8")) for path in paths])


def vocabulary_of(results: Sequence[Result]) -> int:
    """The vocabulary of the first; of none the usual one."""
    return int(results[0]["options"]["model"]["vocab_size"]) if results else VOCABULARY


def order_of_rows(result: Result) -> str:
    """In which order it read the rows of its training data."""
    return "random" if result["version"] >= SHUFFLED_SINCE else "neighbouring"


def distinct(found: Iterable[Findings]) -> list[tuple[str, Result]]:
    """(study, result) of every run that was trained, also `before`: once, where several studies or budgets share it;
    twice, where the same run was trained in both orders of rows, which share its key."""
    runs: dict[tuple[str, str], tuple[str, Result]] = {}
    for findings in found:
        for result in (*findings.results, *findings.before):
            runs.setdefault((result["key"], order_of_rows(result)), (findings.study.name, result))
    return list(runs.values())


def own(result: Result) -> dict[str, Any]:
    """The evaluation at the model's own budget."""
    quality: dict[str, Any] = result["own"]
    return quality


def paired(group: Sequence[tuple[int, float]], baseline: Sequence[tuple[int, float]]) -> Spread | None:
    """Differences of the (seed, value) pairs that both have; None where there is no such seed."""
    there = dict(baseline)
    differences = [value - there[seed] for seed, value in group if seed in there]
    return Spread.of(differences) if differences else None


def losses(group: Sequence[Result]) -> list[tuple[int, float]]:
    """(seed, causal NLL) of results."""
    return [(result["seed"], own(result)["nll"]) for result in group]


def _summary(findings: Findings, arm: str, budget: str) -> ArmSummary:
    group, baseline = findings.of(arm, budget), findings.baseline_of(arm)
    quality = [own(result) for result in group]
    ahead = [(q["nll"], q["gap"]["nll"]) for q in quality if q["gap"] is not None]
    difference = None if arm == baseline else paired(losses(group), losses(findings.of(baseline, budget)))
    return ArmSummary(
        arm=arm,
        budget=budget,
        seeds=tuple(sorted(result["seed"] for result in group)),
        nll=Spread.of([q["nll"] for q in quality]),
        mean_depth=Spread.of([q["mean_depth"] for q in quality]),
        difference=difference,
        top_k=Spread.of([nll - gap for nll, gap in ahead]) if ahead else None,
        gap=Spread.of([gap for _, gap in ahead]) if ahead else None,
        gap_share=Spread.of([gap / nll for nll, gap in ahead]) if ahead else None,
        tokens=statistics.fmean(r["training"]["tokens"] for r in group),
        flops_per_token=statistics.fmean(q["flops_per_token"] for q in quality),
        kv_bytes_per_token=statistics.fmean(q["kv_bytes_per_token"] for q in quality),
        non_embedding=group[0]["parameters"]["non_embedding"],
    )
