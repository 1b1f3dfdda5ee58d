"""All tables and figures of the studies, written from their results; and pages that quote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mor.files import write_text
from mor.study.claims import Claim, claims
from mor.study.results import Findings
from mor.study.tables import origin

TABLES = "tables.md"
QUOTED = re.compile(r"(<!-- ((?:table|figure): \S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
LEGEND = """\
Means over seeds ± the standard deviation between seeds. *Less ...*: NLL less that of the baseline with the same seed, ±
the standard error of that mean. *Gap*: causal less `top_k` NLL, which sees later tokens, in % of the causal one.
Parameters: unique, non-embedding. FLOPs: forward, by the complete rule, at the depths that tokens took. Mean depth:
block applications per token, measured. NLL: nats per token of held-out text.
"""


def write_report(found: Mapping[str, Findings], folder: Path) -> Path:
    """Write `tables.md`, which is returned, and the figures into `folder`; figures of results that are gone go."""
    folder.mkdir(parents=True, exist_ok=True)
    every = claims(found)
    drawn = {f"{name}.svg": svg for claim in every for name, svg in claim.figures.items() if svg is not None}
    for old in folder.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        write_text(folder / name, svg)
    write_text(folder / TABLES, report_text(every, found))
    return folder / TABLES


def report_text(every: list[Claim], found: Mapping[str, Findings]) -> str:
    """All tables in Markdown, with links to the figures."""
    parts = [
        "# Tables of the studies\n",
        "`mor results` writes this file; what it means is in [results](../results.md).\n",
    ]
    parts += [LEGEND]
    for claim in (claim for claim in every if claim.has_results):
        parts += [f"## {claim.title}\n", *(table.text for table in claim.tables)]
        parts += [f"![{name}]({name}.svg)\n" for name, svg in claim.figures.items() if svg is not None]
    if any(findings.results for findings in found.values()):
        parts += ["## Where the numbers come from\n", origin(list(found.values()))]
    return "\n".join(parts)


def quote(page: str, found: Mapping[str, Findings], folder: str) -> str:
    """The page with what stands between `<!-- table: NAME -->`, or `<!-- figure: NAME -->`, and `<!-- end -->` replaced
    by that table or figure, whose file is in `folder` beside the page. A figure that has no results is left out.

    Raises ValueError for a name that there is not.
    """
    every = claims(found)
    known = {f"table: {table.name}": table.text for claim in every for table in claim.tables}
    for name, svg in (pair for claim in every for pair in claim.figures.items()):
        known[f"figure: {name}"] = "" if svg is None else f"![{name}]({folder}/{name}.svg)\n"

    def quoted(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise ValueError(f"the page quotes {match[2]!r}; there are {', '.join(known)}")
        return f"{match[1]}\n{known[match[2]]}\n{match[3]}"

    return QUOTED.sub(quoted, page)
