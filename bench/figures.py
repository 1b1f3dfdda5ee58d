"""Figures of what the benches measured, from stored results: growth, the ablation, and latency against load.

    python -m bench.figures FOLDER/*.json --out FOLDER [--sequences 64 --context 256 --ablation 256x256]

Reads the JSON of `bench.decode` and `mor bench throughput`, and draws what it finds points for, without a GPU:

- `by_sequences.svg`, `by_context.svg`: tokens per second of vanilla and MoR-3 at one context, and at one number of
  sequences.
- `by_recursions.svg`: MoR-R beside the vanilla model with as many layers, at the point of the ablation; and how much
  faster it would be if both took no longer than their bytes and FLOPs.
- `first_token.svg`, `between_pieces.svg`: milliseconds that requests wait, median and 99th percentile, against requests
  per second.
- `ablation.svg`: where the speed comes from. Every factor is a ratio of the tokens per second of two arms at one point:

  | factor | arms | what differs |
  |---|---|---|
  | one block, three visits | recursive-3 / vanilla | weights shared; layer passes, keys and values are the same |
  | smaller KV reads | mor-3-lockstep / recursive-3 | fewer entries per recursion; slots wait, so no pass is saved |
  | no bubbles | mor-3 / mor-3-lockstep | who is through starts the next token; the head runs in every visit |

  These three multiply to MoR-3 / vanilla. Others look at the same from another side, and do not multiply with them:

  | factor | arms | what differs |
  |---|---|---|
  | fewer layer passes | mor-3 / recursive-3-depthwise | two recursions on average instead of three, with their reads |
  | fewer launches | recursive-3 / recursive-3-depthwise | head, draw, outer layers in one visit of three, not in each |
  | bigger batches | MoR / MoR | in a pool: at its own best number of sequences, and at vanilla's |
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mor.show.figure_key import with_key
from mor.show.figures import Series, line_chart
from mor.show.numbers import compact
from mor.show.page import svg_file
from mor.show.span_chart import Span, span_chart, waterfall

Line = dict[str, Any]
CHAIN = (
    ("one block, three visits", "recursive-3", "vanilla"),
    ("smaller KV reads", "mor-3-lockstep", "recursive-3"),
    ("no bubbles", "mor-3", "mor-3-lockstep"),
)
ASIDE = (
    ("fewer layer passes", "mor-3", "recursive-3-depthwise"),
    ("fewer launches", "recursive-3", "recursive-3-depthwise"),
)
ARMS = {"mor-3": 0, "vanilla": 1, "recursive-3": 2, "mor-2": 3, "mor-4": 4, "vanilla-4": 5}
GROWING = ("vanilla", "mor-3")
READ = ("decode", "throughput")


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of all files: whole ones, or logs whose last line they are."""
    return [json.loads(path.read_text().strip().splitlines()[-1]) for path in paths]


def growth(lines: Sequence[Line], by: str, title: str) -> str | None:
    """Tokens per second of vanilla and MoR-3 against `by`. A straight line is a power law."""
    series = []
    for name in GROWING:
        points = {line[by]: line["tokens_per_second"] for line in lines if line["arm"] == name}
        series.append(_series(name, [(math.log2(x), math.log2(y)) for x, y in sorted(points.items())]))
    return _chart(series, title, x_label=by, y_label="tokens/s", x_format=_power, y_format=_power)


def by_recursions(lines: Sequence[Line]) -> str | None:
    """MoR-R relative to its vanilla twin, measured and as the lower bounds of both would have it."""
    points = {
        line["recursions"]: (line["times_vanilla"], line["times_vanilla"] / line["share_of_ideal"])
        for line in lines
        if line["arm"] == f"mor-{line['recursions']}"
    }
    if not points:
        return None
    points[1] = 1.0, 1.0
    series = [
        Series(name=name, arm=arm, dots=True, points=tuple((r, points[r][arm]) for r in sorted(points)))
        for arm, name in enumerate(("measured", "if bytes and FLOPs were all"))
    ]
    title = "MoR-R beside the vanilla model with as many layers"
    return _chart(series, title, x_label="recursions R", y_label="times vanilla's tokens/s", x_format=_whole)


def ablation(lines: Sequence[Line], tries: Sequence[Line], arms: Sequence[Line], point: str) -> str | None:
    """The chain of factors from vanilla to MoR-3, and those that look at it from another side."""
    speed = {line["arm"]: line["tokens_per_second"] for line in lines}
    if any(arm not in speed for _, *pair in CHAIN for arm in pair):
        return None
    spans = waterfall([(name, speed[arm] / speed[base]) for name, arm, base in CHAIN], "MoR-3 / vanilla")
    beside = [(name, speed[arm] / speed[base]) for name, arm, base in ASIDE if {arm, base} <= speed.keys()]
    beside += bigger_batches(tries, arms)
    spans += [Span(name=name, start=1.0, end=factor, arm=2) for name, factor in beside]
    title = f"where the speed comes from, {point}"
    return svg_file(span_chart(spans, title=title, x_label="times as many tokens per second, logarithmic"))


def bigger_batches(tries: Sequence[Line], arms: Sequence[Line]) -> list[tuple[str, float]]:
    """Of each MoR arm and pool: tokens per second at its best number of sequences, relative to those at vanilla's."""
    found = []
    for arm in arms:
        speed = {t["concurrency"]: t["tokens_per_second"] for t in tries if _key(t) == _key(arm)}
        vanilla = f"vanilla-{arm['arm'].rpartition('-')[2]}"
        theirs = [a["concurrency"] for a in arms if a["pool"] == arm["pool"] and a["arm"] in (vanilla, "vanilla")]
        if arm["arm"].startswith("mor") and theirs and theirs[0] in speed:
            name = f"bigger batches ({arm['arm']}, {arm['pool']})"
            found.append((name, max(speed.values()) / speed[theirs[0]]))
    return found


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return line["arm"], line["pool"]


def latency(lines: Sequence[Line], what: str, title: str) -> str | None:
    """`what` (`first_token` or `gap`) of each arm against load: the median as dots, the 99th percentile as rings."""
    series = []
    for name in dict.fromkeys(line["arm"] for line in lines):
        for share, is_tail in (("p50", False), ("p99", True)):
            points = sorted(
                (line["requests_per_second"], math.log2(1000 * line[f"{what}_{share}"]))
                for line in lines
                if line["arm"] == name and line[f"{what}_{share}"]
            )
            arm = ARMS.get(name, 6) + 8 * is_tail  # the same colour in other dashes
            series.append(
                Series(name=f"{name}, {share}", arm=arm, points=tuple(points), dots=not is_tail, rings=is_tail)
            )
    return _chart(series, title, x_label="requests per second", y_label="milliseconds", y_format=_power)


def _series(name: str, points: Sequence[tuple[float, float]]) -> Series:
    return Series(name=name, arm=ARMS.get(name, 6), points=tuple(points), dots=True)


def _chart(
    series: Sequence[Series],
    title: str,
    *,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str] = compact,
    y_format: Callable[[float], str] | None = None,
) -> str | None:
    """An SVG with its own colours and a key; nothing without points."""
    if not any(line.points for line in series):
        return None
    figure = line_chart(series, title=title, x_label=x_label, y_label=y_label, x_format=x_format, y_format=y_format)
    return svg_file(with_key(figure, series))


def _power(value: float) -> str:
    return compact(2**value)


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""


def draw(found: Sequence[dict[str, Any]], *, sequences: int, context: int, ablated: str) -> dict[str, str]:
    """All figures that there are points for, by the name of their file."""
    lines = [
        line for one in found if one["benchmark"] == "decode" for line in one["lines"] if line.get("top_p", 1) == 1
    ]
    served = [one for one in found if one["benchmark"] == "throughput"]
    tries, arms, latencies = ([line for one in served for line in one[key]] for key in ("tries", "arms", "latencies"))
    at = [line for line in lines if line.get("point") == ablated]
    figures = {
        "by_sequences": growth(
            [line for line in lines if line["context"] == context and line["place"].isdigit()],
            "sequences",
            f"tokens per second at context {context}",
        ),
        "by_context": growth(
            [line for line in lines if line["sequences"] == sequences and line["place"].isdigit()],
            "context",
            f"tokens per second of {sequences} sequences",
        ),
        "by_recursions": by_recursions(at),
        "ablation": ablation(at, tries, arms, ablated),
        "first_token": latency(latencies, "first_token", "time to the first token against load"),
        "between_pieces": latency(latencies, "gap", "time between the pieces of an output against load"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="at which growth with the context is drawn")
    parser.add_argument("--context", type=int, default=256, help="at which growth with the sequences is drawn")
    parser.add_argument("--ablation", default="256x256", help="the point of the ablation and of the recursions")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    known = [one for one in read(arguments.logs) if isinstance(one, dict) and one.get("benchmark") in READ]
    figures = draw(known, sequences=arguments.sequences, context=arguments.context, ablated=arguments.ablation)
    for name, figure in figures.items():
        (arguments.out / f"{name}.svg").write_text(figure)
    print(json.dumps(dict(benchmark="figures", read=len(known), figures=sorted(figures))))


if __name__ == "__main__":
    main()
