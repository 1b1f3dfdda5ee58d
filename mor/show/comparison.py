"""The comparison of MoR with its twins, as rows of text: one table for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mor.show.numbers import compact, count, percent

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One trained model of a comparison, in numbers.

    `parameters`: unique, embedding included. `flops_per_token`: forward, by the complete rule, at the depths that the
    model really used. `kv_bytes_per_token`: bf16. `bits_per_byte` and its standard error: on held-out text, causal.
    `training_curve`: (training FLOPs, loss in nats per token). `validation_curve`: (training FLOPs, causal bits per
    byte).
    """

    name: str
    title: str
    parameters: int
    flops_per_token: float
    kv_bytes_per_token: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens_per_second: float
    mean_depth: float
    num_recursions: int
    training_tokens: int
    training_flops: float
    seconds: float
    training_curve: Curve = ()
    validation_curve: Curve = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: its header, how a value is written, and whether low or high is good (0: neither)."""

    header: str
    unit: str
    value: Callable[[Arm], float]
    write: Callable[[float], str]
    better: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A written value, its standard error and its share of the baseline's value where they apply, and whether it is the
    best of its column."""

    text: str
    error: str = ""
    relative: str = ""
    best: bool = False


COLUMNS: tuple[Column, ...] = (
    Column(header="parameters", unit="unique", value=lambda arm: arm.parameters, write=count, better=-1),
    Column(header="FLOPs/token", unit="forward", value=lambda arm: arm.flops_per_token, write=compact, better=-1),
    Column(header="KV/token", unit="bytes, bf16", value=lambda arm: arm.kv_bytes_per_token, write=compact, better=-1),
    Column(header="mean depth", unit="recursions", value=lambda arm: arm.mean_depth, write="{:.2f}".format, better=0),
    Column(
        header="causal NLL", unit="bits/byte", value=lambda arm: arm.bits_per_byte, write="{:.3f}".format, better=-1
    ),
    Column(header="training", unit="tokens", value=lambda arm: arm.training_tokens, write=count, better=0),
    Column(header="speed", unit="train tok/s", value=lambda arm: arm.tokens_per_second, write=compact, better=1),
)
RELATIVE_HEADERS = ("parameters", "FLOPs/token", "KV/token")


def cells(arms: Sequence[Arm], *, baseline: str) -> list[list[Cell]]:
    """The table's cells, one row per arm in `COLUMNS` order.

    Raises ValueError when no arm is named `baseline`.
    """
    base = next((arm for arm in arms if arm.name == baseline), None)
    if base is None:
        raise ValueError(f"baseline={baseline!r} is not among the arms {[arm.name for arm in arms]}")
    return [[_cell(column, arm, arms, base) for column in COLUMNS] for arm in arms]


def _cell(column: Column, arm: Arm, arms: Sequence[Arm], base: Arm) -> Cell:
    value, reference = column.value(arm), column.value(base)
    is_relative = column.header in RELATIVE_HEADERS and arm is not base and reference
    scores = [column.better * column.value(other) for other in arms]
    return Cell(
        text=column.write(value),
        error=f"± {arm.bits_per_byte_error:.3f}" if column.header == "causal NLL" else "",
        relative=percent(value / reference) if is_relative else "",
        best=bool(column.better) and column.better * value == max(scores),
    )
