"""The figures of a study, from its stored results alone: SVG files that need no GPU and no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mor.show.figure_key import with_key
from mor.show.figures import Point, Series, line_chart
from mor.show.page import svg_file
from mor.study.fits import Optimum, fit_optimum
from mor.study.grid import Study
from mor.study.results import Result, own
from mor.study.studies import WIDTHS


def study_figures(study: Study, results: Sequence[Result]) -> dict[str, str]:
    """SVG files by name, of those figures that the results hold points for."""
    drawn = {f"curves-{budget}.svg": _curves(study, results, budget) for budget in _budgets(results)}
    drawn |= {f"dial-{budget}.svg": _dial(study, results, budget) for budget in _budgets(results)}
    drawn |= {"pareto.svg": _pareto(study, results), "isoflop.svg": _isoflop(results)}
    return {name: svg_file(figure) for name, figure in drawn.items() if figure is not None}


def isoflop_points(results: Sequence[Result]) -> dict[tuple[str, str], list[Point]]:
    """(non-embedding parameters, causal NLL) by kind of arm and budget, for arms named `KIND-SIZE`."""
    points: dict[tuple[str, str], list[Point]] = {}
    for result in results:
        kind, _, size = result["arm"].rpartition("-")
        if kind and size in WIDTHS:
            place = points.setdefault((kind, result["budget"]), [])
            place.append((float(result["parameters"]["non_embedding"]), own(result)["nll"]))
    return points


def optima(results: Sequence[Result]) -> dict[tuple[str, str], Optimum]:
    """The fitted optimum of each kind and budget that has one."""
    fits = {key: fit_optimum(points) for key, points in isoflop_points(results).items()}
    return {key: fit for key, fit in fits.items() if fit is not None}


def _curves(study: Study, results: Sequence[Result], budget: str) -> str | None:
    series = []
    for number, arm in enumerate(study.arms):
        runs = [dict(r["curve"]) for r in _of(results, arm, budget) if r["curve"]]
        if runs:
            shared = sorted(set.intersection(*(set(run) for run in runs)))
            points = tuple((float(tokens), statistics.fmean(run[tokens] for run in runs)) for tokens in shared)
            series.append(Series(name=arm, arm=number, points=points, dots=True))
    return _chart(series, "causal NLL while training, mean over seeds", "training tokens")


def _dial(study: Study, results: Sequence[Result], budget: str) -> str | None:
    series = []
    for number, arm in enumerate(study.arms):
        places: dict[float | None, list[Point]] = {}
        for result in _of(results, arm, budget):
            for e in (own(result), *result["dial"]):
                places.setdefault(e["requested"], []).append((e["mean_depth"], e["nll"]))
        if len(places) > 1:
            points = sorted(_middle(group) for group in places.values())
            series.append(Series(name=arm, arm=number, points=tuple(points), dots=True))
    return _chart(series, "one model, many depths: causal NLL, mean over seeds", "mean depth measured")


def _pareto(study: Study, results: Sequence[Result]) -> str | None:
    series = []
    for number, arm in enumerate(study.arms):
        points = []
        for budget in _budgets(results):
            group = [(own(r)["flops_per_token"], own(r)["nll"]) for r in _of(results, arm, budget)]
            points += [_middle(group)] if group else []
        series.append(Series(name=arm, arm=number, points=tuple(sorted(points)), dots=True))
    return _chart(series, "quality against cost: causal NLL, mean over seeds", "forward FLOPs per token")


def _isoflop(results: Sequence[Result]) -> str | None:
    series, fits = [], optima(results)
    for number, ((kind, budget), points) in enumerate(sorted(isoflop_points(results).items())):
        logs = tuple(sorted((math.log10(x), y) for x, y in points))
        series.append(Series(name=f"{kind} at {budget}", arm=number, points=logs, dots=True))
        if (fit := fits.get((kind, budget))) is not None:
            low, high = logs[0][0], logs[-1][0]
            xs = [low + (high - low) * step / 24 for step in range(25)]
            curve = tuple((x, fit.at(10**x)) for x in xs)
            series.append(Series(name=f"fit to {kind} at {budget}", arm=number, points=curve, thin=True))
    return _chart(series, "isoFLOP: causal NLL by size, thin: fitted parabolas", "log10 of non-embedding parameters")


def _chart(series: Sequence[Series], title: str, x_label: str) -> str | None:
    if not any(line.points for line in series):
        return None
    return with_key(line_chart(series, title=title, x_label=x_label, y_label="NLL, nats"), series)


def _budgets(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result["budget"] for result in results))


def _of(results: Sequence[Result], arm: str, budget: str) -> list[Result]:
    return [result for result in results if (result["arm"], result["budget"]) == (arm, budget)]


def _middle(points: Sequence[Point]) -> Point:
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
