"""The figures of studies, from stored results alone: SVG that needs no GPU and no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from mor.show.figure_key import with_key
from mor.show.figures import Point, Series, line_chart
from mor.show.numbers import compact, count
from mor.show.page import svg_file
from mor.show.palette import ARM_COLORS, ARM_DASHES
from mor.study.depth_tables import EDGE, TOLERANCE, deviations, dial_arms, is_spaced
from mor.study.grid import Study
from mor.study.isoflop import IsoflopFit, isoflop_fits
from mor.study.results import Findings, Result, own
from mor.study.tables import seeds

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
    for arm, group in findings.of_shared_seeds(findings.study.arms, budget).items():
        runs = [dict(r["curve"]) for r in group if r["curve"]]
        if runs:
            shared = sorted(set.intersection(*(set(run) for run in runs)))
            points = tuple((float(tokens), statistics.fmean(run[tokens] for run in runs)) for tokens in shared)
            series.append(Series(name=arm, arm=arm_number(arm, findings.study), points=points, dots=True))
    return _chart(series, f"causal NLL while training, {_words(budget)}, mean over seeds", "training tokens")


def pareto(findings: Findings) -> str | None:
    """NLL by FLOPs per token: a ring at equal tokens, a dot at equal FLOPs."""
    series = []
    for budget in findings.budgets:
        for arm, results in findings.of_shared_seeds(findings.study.arms, budget).items():
            is_last = budget == findings.last_budget
            points = (_middle([(own(r)["flops_per_token"], own(r)["nll"]) for r in results]),)
            number = arm_number(arm, findings.study)
            series.append(_mark(arm, number, points, is_last))
    title = "causal quality against cost, mean over seeds; dot: equal FLOPs, ring: equal tokens"
    return _chart(series, title, "forward FLOPs per token")


def _mark(arm: str, number: int, points: tuple[Point, ...], is_last: bool) -> Series:
    """A dot with a name, or a ring without."""
    name = arm if is_last else ""
    return Series(name=name, arm=number, points=points, joined=False, dots=is_last, rings=not is_last, thin=not is_last)


def thresholds(findings: Findings) -> str | None:
    """Each router's dial, and as a ring the same models under fixed thresholds. Token-choice, which has none, is left
    out."""
    arms = [run.arm for run in findings.study.runs if run.options.model.get("router") != "token_choice"]
    groups = findings.of_shared_seeds(list(dict.fromkeys(arms)), findings.last_budget)
    series = []
    for arm, group in groups.items():
        both = [result for result in group if result["fixed"] is not None]
        if both:
            number = arm_number(arm, findings.study)
            fixed = _middle([(result["fixed"]["mean_depth"], result["fixed"]["nll"]) for result in both])
            series.append(Series(name=arm, arm=number, points=_dial(both), dots=True))
            series.append(Series(name="", arm=number, points=(fixed,), thin=True, rings=True, joined=False))
    title = f"causal, calibrated thresholds; ring: fixed ones; mean over seeds {_seeds(groups.values())}"
    return _chart(series, title, "mean depth measured")


def dial(found: Mapping[str, Findings]) -> str | None:
    """NLL of one model by mean depth."""
    series = [
        Series(name=arm, arm=arm_number(arm, findings.study), points=_dial(group), dots=True)
        for findings, arm, group in _twins(found)
    ]
    return _chart(series, "one model, many depths: causal NLL, mean over seeds", "mean depth measured")


def asked(found: Mapping[str, Findings]) -> str | None:
    """How far mean depths are from those asked for, the worst of the seeds, between lines at 2%; of runs that were
    calibrated on rows at equal distances, where there are such."""
    series = []
    for findings, arm, group in _twins(found):
        group = [result for result in group if is_spaced(result)] or group
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
    return _chart(
        series, "measured mean depth against the one asked for, worst seed", "mean depth asked for", "deviation, %"
    )


def _twins(found: Mapping[str, Findings]) -> list[tuple[Findings, str, list[Result]]]:
    """The arms of the dial that are of the study of twins, of the seeds that all have: what other routers do would
    flatten these."""
    every = [(findings, arm) for findings, arm, _ in dial_arms(found) if findings is found["twins"]]
    groups = found["twins"].of_shared_seeds([arm for _, arm in every], "equal-flops")
    return [(findings, arm, groups[arm]) for findings, arm in every]


def scaling(findings: Findings) -> str | None:
    """NLL by number of recursions, which all tokens take; a ring at the number that was trained."""
    series = []
    for arm, results in findings.of_shared_seeds(findings.study.arms, findings.last_budget).items():
        group = [result for result in results if result["scaling"]]
        if group:
            number, steps = arm_number(arm, findings.study), group[0]["scaling"]
            points = tuple(
                (float(step["recursions"]), statistics.fmean(r["scaling"][n]["nll"] for r in group))
                for n, step in enumerate(steps)
            )
            trained = points[sum(step["is_trained"] for step in steps) - 1]
            series.append(Series(name=arm, arm=number, points=points, dots=True))
            series.append(Series(name="", arm=number, points=(trained,), thin=True, rings=True, joined=False))
    return _chart(series, "causal, every token takes as many recursions; ring: as trained", "recursions")


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
    title = "isoFLOP: causal NLL by size, with parabolas where they have a minimum"
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


def _seeds(groups: Iterable[Sequence[Result]]) -> str:
    return seeds(sorted({result["seed"] for group in groups for result in group}))


def _words(budget: str) -> str:
    return budget.replace("-", " ").replace("flops", "FLOPs")


def _middle(points: Sequence[Point]) -> Point:
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
