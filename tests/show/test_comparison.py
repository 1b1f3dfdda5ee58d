"""The table's cells: best values, shares of the baseline."""

from __future__ import annotations

import pytest

from mor.show.comparison import COLUMNS, Cell, cells
from tests.show.examples import arm, arms


def column(header: str) -> list[Cell]:
    index = next(i for i, c in enumerate(COLUMNS) if c.header == header)
    return [row[index] for row in cells(arms(), baseline="vanilla")]


def test_shares_are_of_the_baseline() -> None:
    assert [cell.relative for cell in column("parameters")] == ["60%", "", "60%"]
    assert [cell.relative for cell in column("FLOPs/token")] == ["75%", "", "100%"]
    assert {cell.relative for cell in column("mean depth")} == {""}


def test_the_best_of_each_column() -> None:
    assert [cell.best for cell in column("causal NLL")] == [False, True, False]
    assert [cell.best for cell in column("FLOPs/token")] == [True, False, False]
    assert [cell.best for cell in column("parameters")] == [True, False, True]
    assert not any(cell.best for cell in column("mean depth"))


def test_quality_carries_its_error() -> None:
    first = column("causal NLL")[0]
    assert (first.text, first.error) == ("2.500", "± 0.020")


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(ValueError, match="baseline='x' is not among the arms"):
        cells([arm("a")], baseline="x")
