"""Figures of what `bench.decode` measured: how tokens per second grow with sequences and fall with context.

    python -m bench.growth LOG.json [LOG.json ...] --sequences 64 --context 256 --out FOLDER

Reads the JSON lines of `bench.decode`. Writes `by_sequences.svg` (at one context) and `by_context.svg` (at one number
of sequences); both axes count doublings, so that a straight line is a power law. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from mor.show.figure_key import with_key
from mor.show.figures import Series, line_chart
from mor.show.page import svg_file


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The measured points of all logs."""
    return [line for path in paths for line in json.loads(path.read_text().strip().splitlines()[-1])["lines"]]


def draw(lines: list[dict[str, Any]], by: str, title: str) -> str:
    """Tokens per second of each arm against `by`, as an SVG with its own colours. Raises ValueError without points."""
    series = []
    for number, name in enumerate(dict.fromkeys(line["arm"] for line in lines)):
        points = sorted((line[by], line["tokens_per_second"]) for line in lines if line["arm"] == name)
        doubled = tuple((math.log2(x), math.log2(y)) for x, y in points)
        series.append(Series(name=name, arm=number, points=doubled, dots=True))
    figure = line_chart(series, title=title, x_label=f"log2 of {by}", y_label="log2 of tokens/s")
    return svg_file(with_key(figure, series))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    lines, found = read(arguments.logs), dict[str, str]()
    for by, other, value in (
        ("sequences", "context", arguments.context),
        ("context", "sequences", arguments.sequences),
    ):
        chosen = [line for line in lines if line[other] == value]
        target = arguments.out / f"by_{by}.svg"
        target.write_text(draw(chosen, by, f"tokens per second at {other} {value}"))
        found[by] = str(target)
    print(json.dumps(dict(benchmark="growth", points=len(lines), figures=found)))


if __name__ == "__main__":
    main()
