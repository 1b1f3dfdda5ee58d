"""Tables of what studies found, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mor.show.numbers import compact, count
from mor.study.results import ArmSummary, Findings, Result, Spread, distinct, order_of_rows, own

NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """`name`: by which a page quotes it. `note`: what stands below it."""

    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def text(self) -> str:
        """In Markdown; a sentence instead where there are no rows."""
        if not self.rows:
            return "*No results yet.*\n"
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        note = f"\n{self.note}\n" if self.note else ""
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + note


def quality_table(name: str, findings: Findings, *, with_kv: bool = False) -> Table:
    """Cost and quality of every arm at every budget, beside the baseline."""
    summaries = findings.summaries()
    budgets = len({summary.budget for summary in summaries}) > 1
    head = [
        *(["budget"] if budgets else []),
        "arm",
        "parameters",
        "tokens",
        "FLOPs/token",
        *(["KV bytes/token"] if with_kv else []),
        "mean depth",
        "causal NLL",
        "`top_k` NLL",
        "gap, % of NLL",
        f"less {_baselines(findings)}",
        "seeds",
    ]
    rows = [_row(summary, budgets, with_kv) for summary in summaries]
    return Table(name=name, head=tuple(head), rows=tuple(rows), note=_progress(findings))


def _row(summary: ArmSummary, with_budget: bool, with_kv: bool) -> tuple[str, ...]:
    return (
        *([summary.budget] if with_budget else []),
        summary.arm,
        count(summary.non_embedding),
        count(summary.tokens),
        compact(summary.flops_per_token),
        *([compact(summary.kv_bytes_per_token)] if with_kv else []),
        f"{summary.mean_depth.mean:.2f}",
        spread(summary.nll),
        spread(summary.top_k),
        share(summary.gap_share),
        difference(summary.difference),
        seeds(summary.seeds),
    )


def _baselines(findings: Findings) -> str:
    names = {findings.baseline_of(arm) for arm in findings.study.arms}
    return findings.study.baseline if len(names) == 1 else "the vanilla model of its size"


def _progress(findings: Findings) -> str:
    """What is missing, and what must not be believed."""
    said, done, runs = [], len(findings.results), len(findings.study.runs)
    if done < runs:
        said.append(f"{done} of {runs} runs are done.")
    if any(order_of_rows(result) == "neighbouring" for result in findings.results):
        said.append("Trained on neighbouring rows.")
    if wrong := sorted({r["arm"] for r in findings.results if not r.get("probe", {"causal": True})["causal"]}):
        said.append(f"**Not causal by the suffix probe: {', '.join(wrong)}.**")
    return " ".join(said)


def gap_table(findings: Findings) -> Table:
    """What deciding causally costs, by size."""
    rows = [
        (
            summary.arm,
            count(summary.non_embedding),
            spread(summary.nll),
            spread(summary.top_k),
            difference(summary.gap),
            share(summary.gap_share),
            f"{summary.mean_depth.mean:.3f}",
            f"{_top_k_depth(findings, summary):.3f}",
            seeds(summary.seeds),
        )
        for summary in findings.summaries()
        if summary.gap is not None
    ]
    head = ("arm", "parameters", "causal NLL", "`top_k` NLL", "gap, nats", "gap, % of NLL", "causal depth")
    return Table(name="gaps", head=(*head, "`top_k` depth", "seeds"), rows=tuple(rows), note=_progress(findings))


def _top_k_depth(findings: Findings, summary: ArmSummary) -> float:
    depths = [r["own"]["gap"]["top_k_depth"] for r in findings.of(summary.arm, summary.budget) if r["own"]["gap"]]
    return statistics.fmean(depths)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An arm of a study at a budget."""

    study: str
    arm: str
    budget: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two cells that differ in `what`, and whose results of one seed are compared."""

    what: str
    cell: Cell
    other: Cell


def pair_table(name: str, found: Mapping[str, Findings], pairs: Sequence[Pair]) -> Table:
    """NLL of one cell less that of another, seed by seed; pairs without a seed that both have are left out."""
    rows = []
    for pair in pairs:
        if both := sides(found, pair):
            tokens = [count(side["training"]["tokens"]) for side in next(iter(both.values()))]
            rows.append((pair.what, pair.cell.arm, pair.other.arm, " / ".join(tokens), *by_seed(both), seeds([*both])))
    head = ("what differs", "arm", "less", "tokens of both", "by seed", "mean", "seeds")
    return Table(name=name, head=head, rows=tuple(rows))


def sides(found: Mapping[str, Findings], pair: Pair) -> dict[int, tuple[Result, Result]]:
    """The two results of a pair by seed, where both are there and read their rows in the same order."""
    group, others = ({r["seed"]: r for r in found[c.study].of(c.arm, c.budget)} for c in (pair.cell, pair.other))
    return {
        seed: (group[seed], others[seed])
        for seed in sorted(group.keys() & others.keys())
        if order_of_rows(group[seed]) == order_of_rows(others[seed])
    }


def by_seed(both: Mapping[int, tuple[Result, Result]]) -> tuple[str, str]:
    """The differences in NLL, each and their mean."""
    differences = [own(result)["nll"] - own(other)["nll"] for result, other in both.values()]
    return ", ".join(f"{value:+.3f}" for value in differences), difference(Spread.of(differences))


def seed_table(found: Mapping[str, Findings]) -> Table:
    """Causal NLL of every run, seed by seed, and which commit each is of; a run of several studies stands once."""
    runs: dict[tuple[str, ...], dict[int, Result]] = {}
    for name, result in distinct(found.values()):
        cell = (name, result["budget"], result["arm"], order_of_rows(result))
        runs.setdefault(cell, {})[result["seed"]] = result
    commits = dict.fromkeys(_commit(result) for _, result in distinct(found.values()))
    marks = {commit: "\\*" * number for number, commit in enumerate(commits)}
    columns = sorted({seed for group in runs.values() for seed in group})

    def told(result: Result | None) -> str:
        if result is None:
            return NOTHING
        return f"{own(result)['nll']:.4f}" + marks[_commit(result)]

    rows = [(*cell, *(told(group.get(seed)) for seed in columns)) for cell, group in runs.items()]
    note = ", ".join(f"`{commit}`{mark}" for commit, mark in marks.items())
    head = ("study", "budget", "arm", "order of rows", *(f"seed {seed}" for seed in columns))
    return Table(name="seeds", head=head, rows=tuple(rows), note=f"Commits: {note}." if marks else "")


def _commit(result: Result) -> str:
    return str(result["provenance"]["commit"])[:7]


def seeds(values: Sequence[int]) -> str:
    """Seeds by name: means over different ones cannot be compared."""
    return ", ".join(str(value) for value in values)


def spread(value: Spread | None, digits: int = 4) -> str:
    """A mean ± the standard deviation between seeds."""
    if value is None:
        return NOTHING
    return f"{value.mean:.{digits}f}" + ("" if math.isnan(value.deviation) else f" ± {value.deviation:.{digits}f}")


def difference(value: Spread | None) -> str:
    """A mean with its sign ± its standard error."""
    if value is None:
        return NOTHING
    return f"{value.mean:+.4f}" + ("" if math.isnan(value.error) else f" ± {value.error:.4f}")


def share(value: Spread | None) -> str:
    """A share of 1 in per cent, ± the standard deviation between seeds."""
    if value is None:
        return NOTHING
    hundred = Spread(mean=100 * value.mean, deviation=100 * value.deviation, count=value.count)
    return f"{hundred.mean:+.2f}" + ("" if math.isnan(hundred.deviation) else f" ± {hundred.deviation:.2f}")


def origin(found: Sequence[Findings]) -> str:
    """Commands, commits, machines and data, each as often as they differ."""
    results = [result for _, result in distinct(found)]
    sources = [result["provenance"] for result in results]
    facts = {
        "command": [source["command"] for source in sources],
        "commit": [str(source["commit"]) for source in sources],
        "hardware": [source["machine"].get("GPU", source["machine"]["processor"]) for source in sources],
        "PyTorch": [source["machine"]["PyTorch"] for source in sources],
        "training data": [source["data"][:16] for source in sources],
        "held-out data": [source["held_out"][:16] for source in sources],
        "held-out tokens": [f"{result['own']['num_tokens']:,}" for result in results],
    }
    return "".join(f"- {name}: {', '.join(f'`{v}`' for v in dict.fromkeys(all))}\n" for name, all in facts.items())
