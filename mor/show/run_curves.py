"""The curves of runs: what they lost, against the tokens, FLOPs or time they spent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mor.show.figures import Point, Series
from mor.show.runs import Record, Run

MOST_POINTS = 400  # of a curve; more would not be seen


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a curve is drawn against: its name, its label, and its value at a training line (None: not recorded)."""

    name: str
    label: str
    value: Callable[[Record], float | None]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a curve shows: the lines that have it, its value in one, and whether it is noisy (drawn thin)."""

    title: str
    unit: str
    records: Callable[[Run], Sequence[Record]]
    value: Callable[[Record], float]
    noisy: bool = False


BITS_PER_BYTE = Quantity(
    title="Held-out text, causal",
    unit="bits per byte",
    records=lambda run: run.evaluations,
    value=lambda line: line["decisions"]["causal"]["bits_per_byte"],
)
CAUSAL_NLL = Quantity(
    title="Held-out text, causal",
    unit="nats per token",
    records=lambda run: run.evaluations,
    value=lambda line: line["decisions"]["causal"]["nll"],
)
TRAINING_LOSS = Quantity(
    title="Training loss",
    unit="nats per token",
    records=lambda run: run.training,
    value=lambda line: line["losses"].get("lm", line["loss"]),
    noisy=True,
)
QUANTITIES: tuple[Quantity, ...] = (BITS_PER_BYTE, CAUSAL_NLL, TRAINING_LOSS)


def axes(runs: Sequence[Run]) -> tuple[Axis, ...]:
    """Tokens, FLOPs and time; the latter in hours, or in minutes when all runs are shorter than one."""
    seconds = [run.newest("seconds") or 0.0 for run in runs]
    unit, size = ("hours", 3600) if max(seconds, default=0.0) >= 3600 else ("minutes", 60)
    return (
        Axis(name="tokens", label="training tokens", value=lambda line: line["tokens"]),
        Axis(name="FLOPs", label="training FLOPs", value=lambda line: line.get("flops")),
        Axis(name=unit, label=f"{unit} of training", value=lambda line: line["seconds"] / size),
    )


def curves(runs: Sequence[Run], quantity: Quantity, axis: Axis) -> list[Series]:
    """One line per run, empty where it has nothing to draw yet."""
    return [
        Series(
            name=run.name,
            points=curve(run, quantity, axis),
            arm=index,
            thin=quantity.noisy,
            dots=not quantity.noisy and len(quantity.records(run)) <= 40,
        )
        for index, run in enumerate(runs)
    ]


def curve(run: Run, quantity: Quantity, axis: Axis) -> tuple[Point, ...]:
    """(axis, quantity) of one run, long curves as means of neighbours.

    Evaluations are not timed: they are placed by their tokens between the training lines around them.
    """
    known = [(0.0, 0.0), *_known(run, axis)]
    if len(known) == 1:
        return ()
    points = [(_place(line["tokens"], known), quantity.value(line)) for line in quantity.records(run)]
    return tuple(_thinned(points))


def _known(run: Run, axis: Axis) -> Iterable[Point]:
    """(tokens, axis) at every training line that records the axis."""
    for line in run.training:
        value = axis.value(line)
        if value is not None:
            yield line["tokens"], value


def _place(tokens: float, known: Sequence[Point]) -> float:
    """The axis where `tokens` were read, on straight lines between what is known and on beyond the last."""
    after = min(max(1, bisect_left(known, tokens, key=lambda point: point[0])), len(known) - 1)
    (x0, y0), (x1, y1) = known[after - 1], known[after]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def _thinned(points: Sequence[Point]) -> Iterable[Point]:
    size = -(-len(points) // MOST_POINTS)
    for start in range(0, len(points), max(1, size)):
        group = points[start : start + size]
        yield sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)
