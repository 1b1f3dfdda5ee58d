"""Tables say what the results say."""

from __future__ import annotations

import dataclasses

import pytest

from mor.study.depth_tables import (
    SPACED_SINCE,
    asked_table,
    cost_table,
    deviations,
    dial_table,
    optimum_table,
    scaling_table,
    threshold_table,
)
from mor.study.isoflop import isoflop_fits
from mor.study.order_tables import order_pair_table, order_table
from mor.study.results import Findings
from mor.study.studies import study
from mor.study.tables import Cell, Pair, Table, gap_table, origin, pair_table, quality_table, seed_table
from tests.study.made_up import DEPTH_ERROR, everything, findings, on_neighbouring_rows
from tests.study.test_results import of_tokens


def row(table: Table, *first: str) -> dict[str, str]:
    """The row that begins so, by column."""
    (found,) = (cells for cells in table.rows if cells[: len(first)] == first)
    return dict(zip(table.head, found, strict=True))


def test_quality_stands_beside_the_baseline() -> None:
    table = quality_table("example", of_tokens())
    mor = row(table, "mor-3")
    assert mor["causal NLL"] == "3.3000 ± 0.5657"
    assert mor["`top_k` NLL"] == "3.2850 ± 0.5586"
    assert mor["gap, % of NLL"] == "+0.44 ± 0.14"
    assert mor["less vanilla"] == "-0.2000 ± 0.1000"
    assert (mor["mean depth"], mor["FLOPs/token"], mor["seeds"]) == ("2.00", "2M", "0, 1")
    assert row(table, "vanilla")["less vanilla"] == "–"
    assert table.note == "4 of 8 runs are done."
    assert table.text.splitlines()[1] == "| " + " | ".join(["---"] * len(table.head)) + " |"
    assert row(quality_table("example", of_tokens(), with_kv=True), "mor-3")["KV bytes/token"] == "1.02k"


def test_without_results_a_table_says_so() -> None:
    assert quality_table("twins", Findings(study=study("twins", 512), results=())).text == "*No results yet.*\n"


def test_models_that_are_not_causal_are_told() -> None:
    found = of_tokens()
    wrong = tuple({**r, "probe": {"causal": r["arm"] == "vanilla"}} for r in found.results)
    note = quality_table("example", dataclasses.replace(found, results=wrong)).note
    assert "**Not causal by the suffix probe: mor-3.**" in note


def test_gaps_by_size() -> None:
    table = gap_table(findings(study("gaps", 512)))
    assert [cells[0] for cells in table.rows] == [
        f"{kind}-3-{size}" for size in ("2m", "6m", "11m") for kind in ("mor", "threshold")
    ]
    assert row(table, "mor-3-2m")["gap, nats"] == "+0.0200 ± 0.0058"
    assert (row(table, "mor-3-2m")["causal depth"], row(table, "mor-3-2m")["`top_k` depth"]) == ("2.000", "1.990")


def test_fixed_thresholds_beside_calibrated_ones() -> None:
    table = threshold_table(findings(study("routers", 512)))
    assert row(table, "mor-3")["fixed less calibrated"] == "+0.2000 ± 0.0000"
    assert row(table, "mor-3")["depth, fixed"] == "1.00 ± 0.00"


def test_pairs_are_compared_seed_by_seed() -> None:
    found = {"example": of_tokens()}
    mor, vanilla = (Cell(study="example", arm=arm, budget="tokens") for arm in ("mor-3", "vanilla"))
    table = pair_table("pairs", found, [Pair(what="routing", cell=mor, other=vanilla)])
    told = row(table, "routing")
    assert (told["arm"], told["less"], told["seeds"]) == ("mor-3", "vanilla", "0, 1")
    assert (told["by seed"], told["mean"]) == ("-0.100, -0.300", "-0.2000 ± 0.1000")
    alone = {"example": of_tokens(arms=("mor-3",))}
    assert pair_table("pairs", alone, [Pair(what="routing", cell=mor, other=vanilla)]).rows == ()


def test_only_runs_that_read_rows_in_one_order_are_compared() -> None:
    both = of_tokens()
    old = on_neighbouring_rows(both)
    mixed = tuple(o if n["arm"] == "vanilla" and n["seed"] else n for o, n in zip(old, both.results, strict=True))
    mor, vanilla = (Cell(study="example", arm=arm, budget="tokens") for arm in ("mor-3", "vanilla"))
    pairs = [Pair(what="routing", cell=mor, other=vanilla)]
    told = row(pair_table("pairs", {"example": dataclasses.replace(both, results=mixed)}, pairs), "routing")
    assert (told["by seed"], told["seeds"]) == ("-0.100", "0")
    note = quality_table("example", dataclasses.replace(both, results=old)).note
    assert note == "4 of 8 runs are done. Trained on neighbouring rows."
    again = {"example": dataclasses.replace(both, before=old)}
    cells = order_pair_table(again, pairs).rows[0]
    assert cells[3:] == ("-0.100, -0.300", "-0.2000 ± 0.1000") * 2
    assert order_table(again).rows[0][2:] == ("4.5000 ± 0.7071", "3.5000 ± 0.7071", "-1.0000 ± 0.0000", "0, 1")
    assert not order_table({"example": both}).rows and not order_pair_table({"example": both}, pairs).rows


def test_every_run_stands_once_with_its_commit() -> None:
    found = everything()
    table = seed_table(found)
    runs = {r["key"] for each in found.values() for r in each.results}
    again = {r["key"] for r in found["twins"].before}
    assert sum(cell != "–" for cells in table.rows for cell in cells[4:]) == len(runs) + len(again)
    new, old = (row(table, "twins", "equal-tokens", "mor-3", order) for order in ("random", "neighbouring"))
    assert float(old["seed 0"]) == pytest.approx(float(new["seed 0"]) + 1)
    later = ({**r, "provenance": {"commit": "def" if r["seed"] else "abc"}} for r in of_tokens().results)
    table = seed_table({"example": dataclasses.replace(of_tokens(), results=tuple(later))})
    told = row(table, "example", "tokens", "vanilla")
    assert (told["seed 0"], told["seed 1"]) == ("3.0000", "4.0000\\*")
    assert table.note == "Commits: `abc`, `def`\\*."


def test_asked_depths_are_compared_inside_the_range_and_runs_count_once() -> None:
    found = everything()
    mor = next(r for r in found["twins"].results if r["arm"] == "mor-2")
    assert [asked for asked, _ in deviations(mor)] == [1.05, 1.25, 1.5, 1.75, 1.95]
    assert {round(error, 9) for _, error in deviations(mor)} == {DEPTH_ERROR}
    table = asked_table(found)
    two = row(table, "expert-choice, 2 recursions", "random", "equal distances")
    assert (two["runs"], two["requests met within 2%"], two["worst deviation"]) == ("6", "30 of 30", "+1.00%")
    assert row(table, "expert-choice, 2 recursions", "neighbouring")["runs"] == "6"
    runs = {r["key"] for each in found.values() for r in each.results if r["dial"]}
    again = {r["key"] for r in found["twins"].before if r["dial"]}
    assert sum(int(cells[3]) for cells in table.rows) == len(runs) + len(again)


def test_calibration_on_neighbouring_rows_is_told_apart() -> None:
    found = everything()
    old = tuple({**r, "version": SPACED_SINCE - (r["seed"] == 0)} for r in found["twins"].results)
    table = asked_table({"twins": dataclasses.replace(found["twins"], results=old)})
    kinds = [cells[1:3] for cells in table.rows if cells[0] == "expert-choice, 2 recursions"]
    assert kinds == [("neighbouring", "equal distances"), ("neighbouring", "neighbouring")]


def test_the_dial_has_a_column_for_each_arm() -> None:
    found = everything()
    table = dial_table(found)
    assert table.head == ("asked depth", "mor-2", "mor-3", "mor-4", "threshold-3")
    assert row(table, "1.95")["mor-3"] == "–"
    assert "±" in row(table, "1.95")["mor-2"]
    assert row(table, "seeds")["mor-2"] == "0, 1, 2"
    assert set(row(table, "order of rows").values()) == {"order of rows", "random"}
    twins = found["twins"]
    mixed = (old if old["arm"] == "mor-4" else new for old, new in zip(twins.before, twins.results, strict=True))
    orders = row(dial_table({**found, "twins": dataclasses.replace(twins, results=tuple(mixed))}), "order of rows")
    assert (orders["mor-3"], orders["mor-4"]) == ("random", "neighbouring")


def test_more_recursions_and_costs() -> None:
    twins = findings(study("twins", 512))
    table = scaling_table(twins)
    assert row(table, "recursive-3")["trained with"] == "3"
    assert row(table, "mor-2")["3"] == "–"
    assert "±" in row(table, "recursive-3")["5"]
    costs = row(cost_table(twins), "2", "mor-3")
    assert (costs["peak memory, GiB"], costs["seeds"]) == ("3.00", "0, 1, 2")
    assert costs["time of vanilla's"] == "100%"
    assert costs["of vanilla's"] == "150%"


def test_times_of_runs_with_unlike_company_are_not_mixed() -> None:
    twins = findings(study("twins", 512))
    unlike = ({**r, "training": {**r["training"], "jobs": 9 - r["seed"]}} for r in twins.results)
    table = cost_table(dataclasses.replace(twins, results=tuple(unlike)))
    assert [cells[0] for cells in table.rows if cells[1] == "mor-3"] == ["9", "8", "7"]


def test_isoflop_curves_have_optima() -> None:
    found = findings(study("isoflop", 512))
    fits = isoflop_fits(found)
    assert {(fit.kind, len(fit.points)) for fit in fits} == {("vanilla", 3), ("recursive-3", 3), ("mor-3", 3)}
    for fit in fits:
        assert fit.optimum is not None and fit.optimum.x == pytest.approx(10**6.4, rel=1e-3)
    table = optimum_table(found)
    assert row(table, "mor-3", "1x")["where it lies"] == "inside the sizes trained"
    assert "mor-3 " in table.note
    growing = optimum_table(findings(study("isoflop", 512), lambda run: float(run.options.model["hidden_size"])))
    assert row(growing, "mor-3", "1x")["where it lies"] == "at the smallest size trained, or below"
    assert isoflop_fits(of_tokens()) == [], "3 is a number of recursions, not a size"


def test_where_numbers_come_from_is_told_once() -> None:
    text = origin([of_tokens()])
    assert "- commit: `abc`\n" in text
    assert "- held-out tokens: `4,096`\n" in text
