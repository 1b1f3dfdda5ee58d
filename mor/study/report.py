"""The table and the figures of a study, written from its stored results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mor.files import write_text
from mor.show.numbers import compact, count, duration
from mor.study.figures import optima, study_figures
from mor.study.grid import Study
from mor.study.results import ArmSummary, Result, Spread, read_results, summarise

HEAD = (
    "budget",
    "arm",
    "parameters",
    "tokens",
    "training FLOPs",
    "FLOPs/token",
    "depth",
    "causal NLL",
    "bits/byte",
    "less baseline",
    "causal gap",
    "seeds",
    "training",
)


def write_report(study: Study, out: Path) -> Path:
    """Write `table.md` and the figures into the study's folder in `out`, and return the former. ValueError when there
    are no results."""
    results = read_results(study, out)
    if not results:
        raise ValueError(f"{out} holds no result of the study {study.name!r} yet")
    folder, figures = out / study.name, study_figures(study, results)
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        write_text(folder / name, figure)
    path = folder / "table.md"
    write_text(path, report_text(study, results, sorted(figures)))
    return path


def report_text(study: Study, results: Sequence[Result], figures: Sequence[str]) -> str:
    """The report in Markdown: the question, the table, the fits, the figures and where the results come from."""
    lines = [
        f"# Study: {study.name}",
        "",
        study.question,
        "",
        f"{len(results)} of {len(study.runs)} runs are done.",
        "",
    ]
    lines += _row(HEAD) + _row(["---"] * len(HEAD))
    for summary in summarise(study, results):
        lines += _row(_cells(study, summary))
    lines += [
        "",
        f"Means over seeds ± the standard deviation between seeds. *Less baseline*: NLL less that of {study.baseline}",
        "with the same seed, ± the standard error of the mean. *Causal gap*: causal less `top_k` NLL, which sees later",
        "tokens; ± as before. Parameters: unique, non-embedding. FLOPs by the complete rule.",
        "",
    ]
    lines += _fits(results)
    lines += [f"![{name.removesuffix('.svg')}]({name})" for name in figures]
    return "\n".join([*lines, "", *_origin(results)]) + "\n"


def _cells(study: Study, summary: ArmSummary) -> list[str]:
    return [
        summary.budget,
        summary.arm,
        count(summary.non_embedding),
        count(summary.tokens),
        f"{summary.training_flops:.2e}",
        compact(summary.flops_per_token),
        f"{summary.mean_depth.mean:.2f}",
        _spread(summary.nll),
        _spread(summary.bits_per_byte),
        "–" if summary.difference is None else _signed(summary.difference),
        "–" if summary.gap is None else _signed(summary.gap),
        str(summary.nll.count),
        duration(summary.seconds.mean),
    ]


def _spread(value: Spread) -> str:
    return f"{value.mean:.4f}" + ("" if math.isnan(value.deviation) else f" ± {value.deviation:.4f}")


def _signed(value: Spread) -> str:
    return f"{value.mean:+.4f}" + ("" if math.isnan(value.error) else f" ± {value.error:.4f}")


def _fits(results: Sequence[Result]) -> list[str]:
    lines = [
        f"- {kind} at {budget}: best at {count(fit.x)} parameters, NLL {fit.loss:.4f}"
        + ("" if fit.is_inside else " (outside the sizes that were trained: an extrapolation)")
        for (kind, budget), fit in sorted(optima(results).items())
    ]
    return ["Fitted optima:", "", *lines, ""] if lines else []


def _origin(results: Sequence[Result]) -> list[str]:
    """Commands, commits, machines and data, each as often as they differ."""
    facts = {
        "command": [r["provenance"]["command"] for r in results],
        "commit": [str(r["provenance"]["commit"]) for r in results],
        "data": [r["provenance"]["data"] for r in results],
        "hardware": [r["provenance"]["machine"].get("GPU", r["provenance"]["machine"]["processor"]) for r in results],
        "PyTorch": [r["provenance"]["machine"]["PyTorch"] for r in results],
    }
    return [f"- {name}: {', '.join(f'`{value}`' for value in dict.fromkeys(values))}" for name, values in facts.items()]


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]
