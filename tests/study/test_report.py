"""Tables and figures from stored results, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mor.study.figures import isoflop_points, optima, study_figures
from mor.study.grid import Study
from mor.study.report import write_report
from mor.study.results import Spread, read_results, summarise
from tests.study.test_grid import example


def evaluation(nll: float, requested: float | None = None, gap: float | None = None) -> dict[str, Any]:
    return {
        "requested": requested,
        "nll": nll,
        "bits_per_byte": nll / 2,
        "mean_depth": requested or 2.0,
        "flops_per_token": 1e6 * (requested or 2.0),
        "gap": None if gap is None else {"nll": gap},
    }


def result(arm: str, budget: str, seed: int, nll: float, *, size: int = 1000, more: Any = ()) -> dict[str, Any]:
    gap = 0.01 * (seed + 1) if arm.startswith("mor") else None
    machine = {"processor": "a processor", "PyTorch": "2.13"}
    return {
        "arm": arm,
        "budget": budget,
        "seed": seed,
        "provenance": {
            "command": "mor study example",
            "commit": "abc",
            "data": "d4",
            "held_out": "d5",
            "machine": machine,
        },
        "parameters": {"non_embedding": size},
        "training": {"tokens": 2560, "seconds": 3.0, "flops": 6e11},
        "own": evaluation(nll, gap=gap),
        "dial": list(more),
        "curve": [[1280, nll + 1], [2560, nll]],
    }


def store(study: Study, out: Path, nll: dict[str, list[float]]) -> None:
    """Results of the budget `tokens`: NLLs by arm, seed by seed."""
    for arm, values in nll.items():
        for seed, value in enumerate(values):
            more = [evaluation(value + 0.1, 1.5)] if arm.startswith("mor") else []
            (run,) = (run for run in study.runs if (run.arm, run.budget, run.seed) == (arm, "tokens", seed))
            place = out / "runs" / run.key
            place.mkdir(parents=True)
            (place / "result.json").write_text(json.dumps(result(arm, "tokens", seed, value, more=more)))


def test_seeds_are_summed_up_and_paired(tmp_path: Path) -> None:
    store(example(), tmp_path, {"vanilla": [3.0, 4.0], "mor-3": [2.9, 3.7]})
    vanilla, mor = summarise(example(), read_results(example(), tmp_path))
    assert (vanilla.arm, vanilla.budget, vanilla.nll.mean, vanilla.nll.count) == ("vanilla", "tokens", 3.5, 2)
    assert vanilla.nll.deviation == pytest.approx(math.sqrt(0.5))
    assert vanilla.difference is None and vanilla.gap is None
    assert mor.difference is not None and mor.gap is not None
    assert mor.difference.mean == pytest.approx(-0.2)
    assert mor.difference.error == pytest.approx(0.1)  # of -0.1 and -0.3
    assert mor.gap.mean == pytest.approx(0.015)


def test_what_has_no_partner_is_not_compared(tmp_path: Path) -> None:
    store(example(), tmp_path, {"mor-3": [3.0]})
    (only,) = summarise(example(), read_results(example(), tmp_path))
    assert only.difference is None
    assert math.isnan(only.nll.deviation)
    with pytest.raises(ValueError, match="a value at least"):
        Spread.of([])


def test_only_seeds_with_a_baseline_are_compared(tmp_path: Path) -> None:
    store(example(), tmp_path, {"vanilla": [3.0], "mor-3": [2.9, 9.0]})
    found = summarise(example(), read_results(example(), tmp_path))[1]
    assert found.nll.count == 2
    assert found.difference is not None and found.difference.count == 1
    assert found.difference.mean == pytest.approx(-0.1)


def test_the_report_names_numbers_and_where_they_come_from(tmp_path: Path) -> None:
    store(example(), tmp_path, {"vanilla": [3.0, 4.0], "mor-3": [2.9, 3.7]})
    text = write_report(example(), tmp_path).read_text()
    assert "4 of 8 runs are done" in text
    assert "3.5000 ± 0.7071" in text
    assert "-0.2000 ± 0.1000" in text
    assert "- command: `mor study example`" in text
    assert "- commit: `abc`" in text
    for name in ("curves-tokens.svg", "dial-tokens.svg", "pareto.svg"):
        assert f"]({name})" in text
        assert (tmp_path / "example" / name).read_text().startswith("<svg")
    assert not (tmp_path / "example" / "isoflop.svg").exists()


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no result of the study 'example' yet"):
        write_report(example(), tmp_path)


def test_isoflop_curves_have_optima() -> None:
    sizes = {"2m": 2e6, "6m": 6e6, "11m": 11e6}
    results = [
        result(f"vanilla-{name}", "1x", 0, 3 + (math.log10(size) - 6.5) ** 2, size=int(size))
        for name, size in sizes.items()
    ]
    assert len(isoflop_points(results)["vanilla", "1x"]) == 3
    assert optima(results)["vanilla", "1x"].x == pytest.approx(10**6.5, rel=1e-3)
    assert "isoflop.svg" in study_figures(example(), results)
    assert isoflop_points([result("mor-3", "1x", 0, 3.0)]) == {}, "3 is a number of recursions, not a size"
