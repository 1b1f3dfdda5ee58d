"""Results that no model gave, in the format of true ones: tables and figures need nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mor.config import to_dict
from mor.model.configuration_mor import WITH_CAPACITIES, MorConfig
from mor.model.cost import count_parameters
from mor.study.grid import Study, StudyRun
from mor.study.measure import VERSION
from mor.study.places import RESULT, RUNS
from mor.study.results import SHUFFLED_SINCE, Findings, Result
from mor.study.studies import STUDIES

Nll = Callable[[StudyRun], float]
DEPTH_ERROR = 0.01  # of the mean depths that are measured


def best_at_2m5(run: StudyRun) -> float:
    """A parabola in log10 of the size with its minimum at 10^6.4, and 0.01 more for each seed."""
    size = count_parameters(MorConfig(**run.options.model)).unique_non_embedding
    return 3 + (math.log10(size) - 6.4) ** 2 + 0.01 * run.seed


def quality(nll: float, depth: float, asked: float | None = None) -> dict[str, Any]:
    return {
        "decision": "causal",
        "requested": asked,
        "num_tokens": 4096,
        "nll": nll,
        "mean_depth": depth,
        "kv_bytes_per_token": 512 * depth,
        "flops_per_token": 1e6 * depth,
    }


def result(run: StudyRun, nll: float) -> dict[str, Any]:
    """What `measure_run` would have written."""
    config = MorConfig(**run.options.model)
    size = count_parameters(config).unique_non_embedding
    last, is_routed = config.num_recursions, config.router in WITH_CAPACITIES
    depth = (1 + last) / 2 if is_routed else float(last)
    gap = 0.01 * (run.seed + 1)
    asked = run.measurement.mean_depths(last) if is_routed else []
    there = "/somewhere/on this machine/shards"
    data = dataclasses.replace(run.options.data, path=there)
    return {
        "version": VERSION,
        "key": run.key,
        "provenance": {
            "command": f"mor study example --data '{there}' --out=/somewhere/studies/",
            "commit": "abc",
            "data": "d4",
            "held_out": "d5",
            "machine": {"processor": "a processor", "PyTorch": "2.13"},
        },
        "options": to_dict(dataclasses.replace(run.options, output=run.key, data=data)),
        "parameters": {"non_embedding": size},
        "training": {
            "tokens": run.tokens,
            "seconds": 3.0,
            "jobs": 2,
            "flops": 6.0 * size * run.tokens,
            "peak_memory_gib": 1.0 + depth,
        },
        "own": {**quality(nll, depth), "gap": {"nll": gap, "top_k_depth": depth - 0.01} if is_routed else None},
        "dial": [quality(nll + 0.1 / d, d * (1 + DEPTH_ERROR), d) for d in asked],
        "fixed": quality(nll + 0.2, 1.0) if is_routed else None,
        "scaling": [
            {"recursions": n, "nll": nll + abs(n - last), "is_trained": n <= last}
            for n in range(1, last + (1 if is_routed else 3))
            if last > 1
        ],
        "probe": {"causal": True},
        "curve": [[run.tokens // 2, nll + 1], [run.tokens, nll]],
    }


def findings(study: Study, nll: Nll = best_at_2m5, runs: Iterable[StudyRun] | None = None) -> Findings:
    """Of all runs, or of these."""
    return Findings(
        study=study,
        results=tuple(
            {**result(run, nll(run)), "arm": run.arm, "budget": run.budget, "seed": run.seed}
            for run in (study.runs if runs is None else runs)
        ),
    )


def on_neighbouring_rows(found: Findings) -> tuple[Result, ...]:
    """The same cells by NLL one higher, as of runs that read neighbouring rows."""
    worse = ({**r["own"], "nll": r["own"]["nll"] + 1} for r in found.results)
    return tuple({**r, "version": SHUFFLED_SINCE - 1, "own": own} for r, own in zip(found.results, worse, strict=True))


def put(study: Study, out: Path, nll: Nll = best_at_2m5, runs: Iterable[StudyRun] | None = None) -> None:
    """Write result.json of all runs, or of these, into a folder of studies."""
    for run in study.runs if runs is None else runs:
        place = out / RUNS / run.key
        place.mkdir(parents=True, exist_ok=True)
        (place / RESULT).write_text(json.dumps(result(run, nll(run))))


def everything(vocabulary: int = 512) -> dict[str, Findings]:
    """Results of all studies, of the twins in both orders of rows."""
    found = {name: findings(function(vocabulary)) for name, function in STUDIES.items()}
    twins = found["twins"]
    return found | {"twins": dataclasses.replace(twins, before=on_neighbouring_rows(twins))}


def nothing(vocabulary: int = 512) -> dict[str, Findings]:
    """The same before anything was trained."""
    return {name: Findings(study=function(vocabulary), results=()) for name, function in STUDIES.items()}
