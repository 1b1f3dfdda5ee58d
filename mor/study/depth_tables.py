"""Tables of what one model does at many depths: the compute dial, fixed thresholds, more recursions; and of cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from mor.show.numbers import compact, count
from mor.study.fits import fit_power_law
from mor.study.isoflop import IsoflopFit, isoflop_fits
from mor.study.results import Findings, Result, Spread, distinct, losses, order_of_rows, own, paired
from mor.study.tables import NOTHING, Table, difference, seeds, spread

TOLERANCE = 0.02  # of an asked mean depth
EDGE = 0.05  # requests from 1 + EDGE to R - EDGE must be met
DIAL_ARMS = {"twins": ("mor-2", "mor-3", "mor-4", "threshold-3"), "routers": ("token-balancing-loss",)}
SPACED_SINCE = 3  # version of results whose thresholds are from rows at equal distances; before, from neighbouring ones


def threshold_table(findings: Findings) -> Table:
    """The same models under calibrated thresholds and under those of a model that was never calibrated."""
    rows = []
    for arm, group in _arms(findings):
        both = [result for result in group if result["fixed"] is not None]
        if both:
            fixed = [(result["seed"], result["fixed"]["nll"]) for result in both]
            rows.append(
                (
                    arm,
                    _depth(own(result)["mean_depth"] for result in both),
                    spread(Spread.of([nll for _, nll in losses(both)])),
                    _depth(result["fixed"]["mean_depth"] for result in both),
                    spread(Spread.of([nll for _, nll in fixed])),
                    difference(paired(fixed, losses(both))),
                    seeds([result["seed"] for result in both]),
                )
            )
    head = ("arm", "depth, calibrated", "NLL, calibrated", "depth, fixed", "NLL, fixed", "fixed less calibrated")
    note = (
        "Fixed: a score of 0.5 for expert-choice, the thresholds of training for threshold-choice, the greatest score "
        "for token-choice."
    )
    return Table(name="thresholds", head=(*head, "seeds"), rows=tuple(rows), note=note)


def asked_table(found: Mapping[str, Findings]) -> Table:
    """How far measured mean depths are from those asked for, by router, by the order of the rows trained on and by the
    rows that thresholds are from; a run of several studies, or of several budgets, counts once."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in (result for _, result in distinct(found.values()) if result["dial"]):
        model = result["options"]["model"]
        kind = f"{_words(model['router'])}, {model['num_recursions']} recursions"
        calibrated = "equal distances" if is_spaced(result) else "neighbouring"
        groups.setdefault((kind, order_of_rows(result), calibrated), []).append(result)
    rows = [(*group, str(len(of)), *_errors(of)) for group, of in sorted(groups.items())]
    head = ("router", "order of rows", "calibrated on rows", "runs")
    head = (*head, "mean deviation", "worst deviation", "requests met within 2%")
    note = f"Requests: those from {1 + EDGE:g} to R - {EDGE:g}. A run that several studies share is counted once."
    return Table(name="asked", head=head, rows=tuple(rows), note=note)


def is_spaced(result: Result) -> bool:
    """Whether its thresholds are from rows at equal distances over the training split."""
    return result["version"] >= SPACED_SINCE


def _words(router: str) -> str:
    return router.replace("_", "-")


def _errors(group: Sequence[Result]) -> tuple[str, str, str]:
    errors = [error for result in group for _, error in deviations(result)]
    within = sum(abs(error) <= TOLERANCE for error in errors)
    mean, worst = statistics.fmean(abs(error) for error in errors), max(errors, key=abs)
    return f"{100 * mean:.2f}%", f"{100 * worst:+.2f}%", f"{within} of {len(errors)}"


def deviations(result: Result) -> list[tuple[float, float]]:
    """(asked, measured / asked - 1) of the mean depths between 1.05 and R - 0.05."""
    last = result["options"]["model"].get("num_recursions", 1) - EDGE
    asked = [e for e in result["dial"] if 1 + EDGE <= e["requested"] <= last]
    return [(e["requested"], e["mean_depth"] / e["requested"] - 1) for e in asked]


def dial_table(found: Mapping[str, Findings]) -> Table:
    """NLL by the mean depth asked for, one column per arm; under each, which seeds and which order of rows it is of."""
    columns, those, orders = dict[str, dict[float, Spread]](), list[str](), list[str]()
    for _, arm, group in dial_arms(found):
        points = {e["requested"] for result in group for e in result["dial"]}
        columns[arm] = {
            asked: Spread.of([e["nll"] for r in group for e in r["dial"] if e["requested"] == asked])
            for asked in sorted(points)
        }
        those.append(seeds([result["seed"] for result in group]))
        orders.append(", ".join(dict.fromkeys(order_of_rows(result) for result in group)))
    depths = sorted({depth for column in columns.values() for depth in column})
    rows = [(f"{depth:g}", *(spread(column.get(depth)) for column in columns.values())) for depth in depths]
    ends = (("seeds", *those), ("order of rows", *orders)) if rows else ()
    return Table(name="dial", head=("asked depth", *columns), rows=(*rows, *ends))


def dial_arms(found: Mapping[str, Findings]) -> Iterator[tuple[Findings, str, list[Result]]]:
    """The arms whose dial is shown, at equal FLOPs, with their results."""
    for name, arms in DIAL_ARMS.items():
        for arm in arms:
            group = found[name].of(arm, "equal-flops")
            if any(result["dial"] for result in group):
                yield found[name], arm, group


def scaling_table(findings: Findings) -> Table:
    """NLL when every token takes the same number of recursions, up to more than were trained."""
    arms = [(arm, group) for arm, group in _arms(findings) if group[0]["scaling"]]
    most = max((len(group[0]["scaling"]) for _, group in arms), default=0)
    rows = []
    for arm, group in arms:
        points = [
            Spread.of([r["scaling"][n]["nll"] for r in group]) if n < len(group[0]["scaling"]) else None
            for n in range(most)
        ]
        trained = sum(point["is_trained"] for point in group[0]["scaling"])
        rows.append((arm, str(trained), *(spread(point) for point in points), seeds([r["seed"] for r in group])))
    head = ("arm", "trained with", *(str(number) for number in range(1, most + 1)), "seeds")
    note = "A router has weights for the recursions it was trained with, so only models without one go on."
    return Table(name="scaling", head=head, rows=tuple(rows), note=note)


def cost_table(findings: Findings) -> Table:
    """Peak memory and time of training at equal tokens, of runs that shared a machine with as many others."""
    groups: dict[tuple[int, str], list[Result]] = {}
    for arm in findings.study.arms:
        for result in findings.of(arm, "equal-tokens"):
            groups.setdefault((result["training"]["jobs"], arm), []).append(result)
    base = findings.study.baseline
    memory = {key: _mean_or_none([r["training"]["peak_memory_gib"] for r in group]) for key, group in groups.items()}
    seconds = {key: Spread.of([r["training"]["seconds"] for r in group]) for key, group in groups.items()}
    rows = [
        (
            str(jobs),
            arm,
            NOTHING if (peak := memory[jobs, arm]) is None else f"{peak:.2f}",
            _ratio(peak, memory.get((jobs, base))),
            spread(seconds[jobs, arm], 1),
            _ratio(seconds[jobs, arm].mean, seconds[jobs, base].mean if (jobs, base) in seconds else None),
            compact(statistics.fmean(r["training"]["tokens"] for r in group) / seconds[jobs, arm].mean),
            seeds([result["seed"] for result in group]),
        )
        for (jobs, arm), group in sorted(groups.items(), key=lambda item: -item[0][0])
    ]
    beside = (f"of {base}'s", f"time of {base}'s")
    head = ("runs at a time", "arm", "peak memory, GiB", beside[0], "seconds", beside[1], "tokens/s", "seeds")
    note = (
        "Seconds are those of a machine that several runs shared, compilation included: how long the study took, not "
        "how fast a model trains. Speed, memory and throughput of the same kinds of models, each alone on a GPU, are "
        "in `bench/results`."
    )
    return Table(name="costs", head=head, rows=tuple(rows), note=note)


def optimum_table(findings: Findings) -> Table:
    """Fitted optima of the isoFLOP curves, beside the points that they are fitted to."""
    rows, growth = [], dict[str, list[tuple[float, float]]]()
    for fit in isoflop_fits(findings):
        sizes, losses_there = zip(*fit.points, strict=True)
        points = (", ".join(count(size) for size in sizes), ", ".join(f"{loss:.3f}" for loss in losses_there))
        best = fit.optimum
        rows.append(
            (
                fit.kind,
                fit.budget,
                f"{fit.flops:.2e}",
                *points,
                NOTHING if best is None else compact(best.x),
                NOTHING if best is None else f"{best.loss:.4f}",
                _place(fit),
            )
        )
        if best is not None and best.is_inside:
            growth.setdefault(fit.kind, []).append((fit.flops, best.x))
    head = ("kind", "budget", "training FLOPs", "sizes", "NLL", "fitted best size", "NLL there", "where it lies")
    powers = [f"{kind} {fit_power_law(points)[1]:.2f}" for kind, points in growth.items() if len(points) > 1]
    note = f"Best size grows as FLOPs to the power of: {', '.join(powers)} (optima inside alone)." if powers else ""
    return Table(name="optima", head=head, rows=tuple(rows), note=note)


def _place(fit: IsoflopFit) -> str:
    """Where the best size lies, in words."""
    if fit.optimum is not None and fit.optimum.is_inside:
        return "inside the sizes trained"
    if len(fit.points) < 3:
        return "fewer than three sizes are done"
    best = min(fit.points, key=lambda point: point[1])
    ends = {fit.points[0]: "at the smallest size trained, or below", fit.points[-1]: "at the largest, or above"}
    return ends.get(best, "the parabola has no minimum")


def _arms(findings: Findings) -> list[tuple[str, list[Result]]]:
    """Arms with their results at the last budget: equal FLOPs where there are two."""
    pairs = [(arm, findings.of(arm, findings.last_budget)) for arm in findings.study.arms]
    return [(arm, group) for arm, group in pairs if group]


def _depth(values: Iterator[float]) -> str:
    return spread(Spread.of(list(values)), 2)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _ratio(value: float | None, base: float | None) -> str:
    return NOTHING if value is None or base is None else f"{100 * value / base:.0f}%"
