"""The key of a figure that stands alone: below it, a line sample and a name for each of its series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from mor.show.figures import Series
from mor.show.palette import arm_class, arm_dash

ROW, COLUMN = 20, 210
MARGIN = 20  # by which the style sheet moves a figure down, and a little
HEAD = re.compile(r'width="(\d+)" height="(\d+)" viewBox="0 0 \d+ \d+"')


def with_key(figure: str, series: Sequence[Series]) -> str:
    """`figure`, an SVG of `mor.show.figures`, made taller by a key of its series that are not thin."""
    found = HEAD.search(figure)
    assert found is not None, "not a figure of mor.show.figures"
    width, height = int(found[1]), int(found[2])
    named = [line for line in series if line.points and not line.thin]
    columns = max(1, width // COLUMN)
    rows = -(-len(named) // columns)
    samples = "".join(
        _sample(line, 8 + COLUMN * (n % columns), height + ROW * (n // columns) + 8) for n, line in enumerate(named)
    )
    taller = height + ROW * rows + MARGIN
    head = f'width="{width}" height="{taller}" viewBox="0 0 {width} {taller}"'
    return HEAD.sub(head, figure, count=1).removesuffix("</svg>") + samples + "</svg>"


def _sample(line: Series, x: int, y: int) -> str:
    dash = arm_dash(line.arm)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    path = f'<path class="line {arm_class(line.arm)}" d="M{x} {y}H{x + 28}"{dashes}/>'
    if not line.joined:
        kind, radius = ("line ring", 5) if line.rings else ("dot", 3.5)
        path = f'<circle class="{kind} {arm_class(line.arm)}" cx="{x + 14}" cy="{y}" r="{radius}"/>'
    return path + f'<text x="{x + 36}" y="{y + 4}">{escape(line.name)}</text>'
