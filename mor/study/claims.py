"""The claims that the studies test, in order, each with its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mor.study import depth_tables as depths
from mor.study import figures
from mor.study.results import Findings
from mor.study.tables import Table, gap_table, quality_table


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A title, and what bears on it. `figures`: SVG files by name, None where the results hold no points for one."""

    title: str
    tables: tuple[Table, ...]
    figures: dict[str, str | None] = field(default_factory=dict)

    @property
    def has_results(self) -> bool:
        """Whether any table has a row."""
        return any(table.rows for table in self.tables)


def claims(found: Mapping[str, Findings]) -> list[Claim]:
    """All claims, whatever has been found of them, and studies that answer none; `found` has every study by name."""
    return [*_models(found), *_depths(found), *_margins(found), *_others(found)]


def _models(found: Mapping[str, Findings]) -> list[Claim]:
    twins, routers, isoflop = found["twins"], found["routers"], found["isoflop"]
    curves = {f"curves-{budget}": figures.curves(twins, f"equal-{budget}") for budget in ("tokens", "flops")}
    return [
        Claim(
            title="1. Twins at equal tokens and at equal FLOPs",
            tables=(quality_table("twins", twins),),
            figures={**curves, "pareto": figures.pareto(twins)},
        ),
        Claim(
            title="2. Controls",
            tables=(quality_table("controls", found["controls"]),),
            figures={"controls": figures.curves(found["controls"], "equal-flops")},
        ),
        Claim(
            title="3. Routers and thresholds",
            tables=(quality_table("routers", routers), depths.threshold_table(routers)),
            figures={"thresholds": figures.thresholds(routers)},
        ),
        Claim(title="4. Keys and values", tables=(quality_table("caches", found["caches"], with_kv=True),)),
        Claim(title="5. Sharing", tables=(quality_table("sharings", found["sharings"]),)),
        Claim(
            title="6. IsoFLOP curves",
            tables=(quality_table("isoflop", isoflop), depths.optimum_table(isoflop)),
            figures={"isoflop": figures.isoflop(isoflop)},
        ),
    ]


def _depths(found: Mapping[str, Findings]) -> list[Claim]:
    twins = found["twins"]
    return [
        Claim(
            title="7. The compute dial",
            tables=(depths.asked_table(found), depths.dial_table(found)),
            figures={"asked": figures.asked(found), "dial": figures.dial(found)},
        ),
        Claim(
            title="8. More recursions than were trained",
            tables=(depths.scaling_table(twins),),
            figures={"scaling": figures.scaling(twins)},
        ),
        Claim(title="9. Time and memory", tables=(depths.cost_table(twins),)),
    ]


def _margins(found: Mapping[str, Findings]) -> list[Claim]:
    return [
        Claim(title="10. The causal gap at three sizes", tables=(gap_table(found["gaps"]),)),
        Claim(title="11. The learning rate", tables=(quality_table("rates", found["rates"]),)),
    ]


def _others(found: Mapping[str, Findings]) -> list[Claim]:
    known = {"twins", "controls", "routers", "caches", "sharings", "isoflop", "gaps", "rates"}
    return [
        Claim(
            title=f"The study {name}",
            tables=(quality_table(name, findings),),
            figures={name: figures.curves(findings, findings.last_budget)},
        )
        for name, findings in found.items()
        if name not in known
    ]
