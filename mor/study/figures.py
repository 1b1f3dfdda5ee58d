"""The figures of studies, from stored results alone: SVG that needs no GPU and no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from mor.show.figure_key import with_key
from mor.show.figures import Point, Series, line_chart
from mor.show.numbers import compact, count
from mor.show.page import svg_file
from mor.show.palette import ARM_COLORS, ARM_DASHES
from mor.study.depth_tables import EDGE, TOLERANCE, deviations, dial_arms
from mor.study.grid import Study
from mor.study.isoflop import IsoflopFit, isoflop_fits
from mor.study.results import Findings, Result, own

ARM_NUMBERS = {
    "mor-3": 0,
    "vanilla": 1,
    "recursive-3": 2,
    "recursive-2": 3,
    "mor-2": 4,
    "mor-4": 5,
    "threshold-3": 6,
    "threshold-choice": 6,
}
OTHERS_FROM = 3
NLL = "NLL, nats"


def arm_number(arm: str, study: Study) -> int:
    """Colour and dash of an arm: vanilla, recursive and MoR models look alike in all figures."""
    if arm in ARM_NUMBERS:
        return ARM_NUMBERS[arm]
    taken = {ARM_NUMBERS[other] for other in study.arms if other in ARM_NUMBERS}
    others = [other for other in study.arms if other not in ARM_NUMBERS]
    free = [number for number in range(OTHERS_FROM, OTHERS_FROM + 2 * len(study.arms)) if number not in taken]
    return free[others.index(arm)]


def curves(findings: Findings, budget: str) -> str | None:
    """NLL while training, mean over seeds."""
    series = []
    for arm in findings.study.arms:
        runs = [dict(r["curve"]) for r in findings.of(arm, budget) if r["curve"]]
        if runs:
            shared = sorted(set.intersection(*(set(run) for run in runs)))
            points = tuple((float(tokens), statistics.fmean(run[tokens] for run in runs)) for tokens in shared)
            series.append(Series(name=arm, arm=arm_number(arm, findings.study), points=points, dots=True))
    return _chart(series, f"causal NLL while training, {_words(budget)}, mean over seeds", "training tokens")


def pareto(findings: Findings) -> str | None:
    """NLL by FLOPs per token: a ring at equal tokens, a dot at equal FLOPs."""
    series = []
    for arm in findings.study.arms:
        number = arm_number(arm, findings.study)
        for budget in findings.budgets:
            group = [(own(r)["flops_per_token"], own(r)["nll"]) for r in findings.of(arm, budget)]
            if group:
                is_last = budget == findings.last_budget
                points = (_middle(group),)
                name = arm if is_last else f"{arm}, {_words(budget)}"
                series.append(
                    Series(name=name, arm=number, points=points, joined=False, dots=is_last, rings=not is_last)
                )
    return _chart(series, "quality against cost, mean over seeds", "forward FLOPs per token")


def thresholds(findings: Findings) -> str | None:
    """Each router's dial, and as a ring the same models under fixed thresholds."""
    series = []
    for arm in findings.study.arms:
        group = [result for result in findings.of(arm, findings.last_budget) if result["fixed"] is not None]
        if group:
            number = arm_number(arm, findings.study)
            fixed = _middle([(result["fixed"]["mean_depth"], result["fixed"]["nll"]) for result in group])
            series.append(Series(name=arm, arm=number, points=_dial(group), dots=True))
            series.append(Series(name=f"{arm}, fixed", arm=number, points=(fixed,), rings=True, joined=False))
    return _chart(series, "calibrated thresholds and fixed ones, mean over seeds", "mean depth measured")


def dial(found: Mapping[str, Findings]) -> str | None:
    """NLL of one model by mean depth."""
    series = [
        Series(name=arm, arm=arm_number(arm, findings.study), points=_dial(group), dots=True)
        for findings, arm, group in dial_arms(found)
    ]
    return _chart(series, "one model, many depths: causal NLL, mean over seeds", "mean depth measured")


def asked(found: Mapping[str, Findings]) -> str | None:
    """How far mean depths are from those asked for, the worst of the seeds, between lines at 2%."""
    series = []
    for findings, arm, group in dial_arms(found):
        places: dict[float, list[float]] = {}
        for depth, error in (pair for result in group for pair in deviations(result)):
            places.setdefault(depth, []).append(100 * error)
        points = tuple((depth, max(errors, key=abs)) for depth, errors in sorted(places.items()))
        series.append(Series(name=arm, arm=arm_number(arm, findings.study), points=points, dots=True))
    if not any(line.points for line in series):
        return None
    most = max(x for line in series for x, _ in line.points)
    for limit in (-100 * TOLERANCE, 100 * TOLERANCE):
        series.append(Series(name="", arm=1, points=((1 + EDGE, limit), (most, limit)), thin=True))
    return _chart(series, "measured mean depth against the one asked for", "mean depth asked for", "deviation, %")


def scaling(findings: Findings) -> str | None:
    """NLL by number of recursions, which all tokens take; a ring at the number that was trained."""
    series = []
    for arm in findings.study.arms:
        group = [result for result in findings.of(arm, findings.last_budget) if result["scaling"]]
        if group:
            number, steps = arm_number(arm, findings.study), group[0]["scaling"]
            points = tuple(
                (float(step["recursions"]), statistics.fmean(r["scaling"][n]["nll"] for r in group))
                for n, step in enumerate(steps)
            )
            trained = points[sum(step["is_trained"] for step in steps) - 1]
            series.append(Series(name=arm, arm=number, points=points, dots=True))
            series.append(Series(name="", arm=number, points=(trained,), thin=True, rings=True, joined=False))
    return _chart(series, "every token takes as many recursions; ring: as trained", "recursions")


def isoflop(findings: Findings) -> str | None:
    """NLL by size at each budget, with fitted parabolas; where none fits, points are joined."""
    series, fits = [], isoflop_fits(findings)
    budgets = list(dict.fromkeys(fit.budget for fit in fits))
    for fit in fits:
        number = _dashed(ARM_NUMBERS[fit.kind], budgets.index(fit.budget))
        logs = tuple((math.log10(x), y) for x, y in fit.points)
        line = logs if fit.optimum is None else _parabola(fit)
        series.append(Series(name=f"{fit.kind} at {fit.budget}", arm=number, points=line))
        series.append(Series(name="", arm=number, points=logs, thin=True, dots=True, joined=False))
    title = "isoFLOP: causal NLL by size, with fitted parabolas"
    return _chart(series, title, "non-embedding parameters", x_format=lambda log: count(10**log, digits=2))


def _dashed(number: int, dash: int) -> int:
    """A number of the same colour with the dashes number `dash`."""
    colors = len(ARM_COLORS["light"])
    return number + colors * ((dash - number) % len(ARM_DASHES))


def _parabola(fit: IsoflopFit) -> tuple[Point, ...]:
    assert fit.optimum is not None
    low, high = math.log10(fit.points[0][0]), math.log10(fit.points[-1][0])
    places = [low + (high - low) * step / 24 for step in range(25)]
    return tuple((x, fit.optimum.at(10**x)) for x in places)


def _dial(group: Sequence[Result]) -> tuple[Point, ...]:
    places: dict[float, list[Point]] = {}
    for e in (e for result in group for e in result["dial"]):
        places.setdefault(e["requested"], []).append((e["mean_depth"], e["nll"]))
    return tuple(sorted(_middle(points) for points in places.values()))


def _chart(
    series: Sequence[Series], title: str, x_label: str, y_label: str = NLL, x_format: Callable[[float], str] = compact
) -> str | None:
    if not any(line.points for line in series):
        return None
    figure = line_chart(series, title=title, x_label=x_label, y_label=f"{title}: {y_label}", x_format=x_format)
    return svg_file(with_key(figure, series))


def _words(budget: str) -> str:
    return budget.replace("-", " ").replace("flops", "FLOPs")


def _middle(points: Sequence[Point]) -> Point:
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
