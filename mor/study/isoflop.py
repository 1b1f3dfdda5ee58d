"""IsoFLOP curves: causal NLL by size at equal FLOPs, and the parabola through them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from mor.study.fits import Optimum, Point, fit_optimum
from mor.study.results import Findings, own
from mor.study.studies import WIDTHS


@dataclass(frozen=True, kw_only=True)
class IsoflopFit:
    """The sizes of one kind of model at one budget. `points`: (non-embedding parameters, causal NLL). `flops`: training
    FLOPs, mean over the sizes. `optimum`: None where no parabola with a minimum fits."""

    kind: str
    budget: str
    points: tuple[Point, ...]
    flops: float
    optimum: Optimum | None


def isoflop_fits(findings: Findings) -> list[IsoflopFit]:
    """One for each kind and budget, of arms named `KIND-SIZE`."""
    places: dict[tuple[str, str], list[tuple[Point, float]]] = {}
    for result in findings.results:
        kind, _, size = result["arm"].rpartition("-")
        if kind and size in WIDTHS:
            point = (float(result["parameters"]["non_embedding"]), own(result)["nll"])
            places.setdefault((kind, result["budget"]), []).append((point, result["training"]["flops"]))
    return [
        IsoflopFit(
            kind=kind,
            budget=budget,
            points=tuple(sorted(point for point, _ in found)),
            flops=statistics.fmean(flops for _, flops in found),
            optimum=fit_optimum([point for point, _ in found]),
        )
        for (kind, budget), found in sorted(places.items())
    ]
