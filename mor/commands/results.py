"""Tables and figures of the studies, from stored results: without a GPU and without a model.

mor results                                          of bench/results/studies, into docs/results and docs/results.md
mor results studies --store bench/results/studies    first stores the results of a folder of studies
mor results studies --store bench/results/studies --only twins,controls    of these; what is stored of others stays
mor results studies --out report                     only looks at such a folder
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mor.study.results import Findings

STORED = "bench/results/studies"
OUT = "docs/results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place", nargs="?", default=STORED, metavar="DIR", help=f"folder of studies or of stored results ({STORED})"
    )
    parser.add_argument("--store", metavar="DIR", help="store the results here, as a file of JSON lines for each study")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,NAME,...",
        help="store these studies alone (all that have results)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=OUT,
        help=f"folder of tables.md and figures; what DIR.md quotes is quoted again ({OUT})",
    )


def run(arguments: argparse.Namespace) -> None:
    from mor.files import write_text
    from mor.study.report import quote, write_report
    from mor.study.stored import read_place, store

    found, out = read_place(Path(arguments.place)), Path(arguments.out)
    if not any(findings.results for findings in found.values()):
        raise ValueError(f"{arguments.place} holds no results of studies, neither runs/*/result.json nor NAME.jsonl")
    if arguments.only and not arguments.store:
        raise ValueError(f"--only {','.join(arguments.only)} chooses what is stored: give --store DIR")
    if arguments.store:
        for file in store(_chosen(found, arguments.only), Path(arguments.store)):
            print(f"stored: {file}")
        found = read_place(Path(arguments.store))
    print(f"tables: {write_report(found, out)}")
    page = out.with_name(f"{out.name}.md")
    if page.is_file():
        write_text(page, quote(page.read_text(encoding="utf-8"), found, out.name))
        print(f"quoted: {page}")


def _chosen(found: Mapping[str, Findings], only: list[str]) -> list[Findings]:
    for name in only:
        if name not in found or not found[name].results:
            there = ", ".join(name for name, findings in found.items() if findings.results)
            raise ValueError(f"--only {name}: no results of such a study; there are results of {there}")
    return [findings for name, findings in found.items() if not only or name in only]
