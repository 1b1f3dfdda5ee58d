"""The claims that the studies test, in order, each with its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mor.study import depth_tables as depths
from mor.study import figures
from mor.study.order_tables import order_pair_table, order_table
from mor.study.results import Findings
from mor.study.studies import WIDTHS
from mor.study.tables import Cell, Pair, Table, gap_table, pair_table, quality_table, seed_table


def _cell(arm: str, budget: str = "flops", study: str = "twins") -> Cell:
    return Cell(study=study, arm=arm, budget=f"equal-{budget}")


def _control(arm: str) -> Cell:
    return _cell(arm, study="controls")


def _cache(arm: str) -> Cell:
    return _cell(arm, study="caches")


def _sharing(arm: str) -> Cell:
    return _cell(arm, "tokens", "sharings")


def _gap(arm: str) -> Cell:
    return Cell(study="gaps", arm=arm, budget="1x")


WORDS = {"tokens": "tokens", "flops": "FLOPs"}
TWIN_PAIRS = tuple(
    Pair(what=f"MoR, equal {WORDS[budget]}", cell=_cell(arm, budget), other=_cell(base))
    for budget in WORDS
    for arm, base in (
        ("mor-2", "vanilla"),
        ("mor-3", "vanilla"),
        ("mor-4", "vanilla"),
        ("threshold-3", "vanilla"),
        ("mor-2", "recursive-2"),
        ("mor-3", "recursive-3"),
    )
) + tuple(
    Pair(what=f"its router, equal {WORDS[budget]}", cell=_cell("threshold-3", budget), other=_cell("mor-3", budget))
    for budget in WORDS
)
CONTROL_PAIRS = (
    Pair(what="the gate, equal tokens", cell=_control("gate"), other=_cell("recursive-3")),
    Pair(what="the gate, equal tokens", cell=_control("gate"), other=_cell("vanilla")),
    Pair(what="leaving early, equal tokens", cell=_cell("mor-3", "tokens"), other=_control("gate")),
    Pair(what="random scores, equal FLOPs", cell=_control("random"), other=_cell("mor-3")),
    Pair(what="two recursions, no gate, equal FLOPs", cell=_control("early-only"), other=_cell("mor-3")),
    Pair(what="one pass, no gate, equal FLOPs", cell=_control("vanilla-shallow"), other=_cell("mor-3")),
    Pair(what="a third of the block, equal FLOPs", cell=_control("vanilla-shallow"), other=_cell("vanilla")),
)
CACHE_PAIRS = (
    Pair(what="shared, expert-choice", cell=_cache("expert-shared"), other=_cache("mor-3")),
    Pair(what="hybrid, expert-choice", cell=_cache("expert-hybrid"), other=_cache("mor-3")),
    Pair(what="shared, token-choice", cell=_cache("token-shared"), other=_cache("token-recursion")),
    Pair(what="hybrid, token-choice", cell=_cache("token-hybrid"), other=_cache("token-recursion")),
)
SHARING_PAIRS = tuple(
    Pair(what=what, cell=_sharing(arm), other=_sharing(other))
    for what, arm, other in (
        ("layers of their own at both ends", "middle-cycle-2", "cycle-2"),
        ("layers of their own at both ends", "middle-sequence-2", "sequence-2"),
        ("cycle or sequence", "middle-cycle-2", "middle-sequence-2"),
        ("cycle or sequence", "middle-cycle-3", "middle-sequence-3"),
        ("cycle or sequence", "cycle-2", "sequence-2"),
    )
)
GAP_PAIRS = tuple(
    Pair(what="the router that trains causally", cell=_gap(f"threshold-3-{size}"), other=_gap(f"mor-3-{size}"))
    for size in WIDTHS
)


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
    every = Claim(title="Every run", tables=(seed_table(found),))
    return [*_models(found), *_depths(found), *_margins(found), *_others(found), _orders(found), every]


def _models(found: Mapping[str, Findings]) -> list[Claim]:
    twins, routers, isoflop = found["twins"], found["routers"], found["isoflop"]
    curves = {f"curves-{budget}": figures.curves(twins, f"equal-{budget}") for budget in ("tokens", "flops")}
    return [
        Claim(
            title="1. Twins at equal tokens and at equal FLOPs",
            tables=(quality_table("twins", twins), pair_table("twin-pairs", found, TWIN_PAIRS)),
            figures={**curves, "pareto": figures.pareto(twins)},
        ),
        Claim(
            title="2. Controls",
            tables=(quality_table("controls", found["controls"]), pair_table("control-pairs", found, CONTROL_PAIRS)),
            figures={"controls": figures.curves(found["controls"], "equal-flops")},
        ),
        Claim(
            title="3. Routers and thresholds",
            tables=(quality_table("routers", routers), depths.threshold_table(routers)),
            figures={"thresholds": figures.thresholds(routers)},
        ),
        Claim(
            title="4. Keys and values",
            tables=(
                quality_table("caches", found["caches"], with_kv=True),
                pair_table("cache-pairs", found, CACHE_PAIRS),
            ),
        ),
        Claim(
            title="5. Sharing",
            tables=(quality_table("sharings", found["sharings"]), pair_table("sharing-pairs", found, SHARING_PAIRS)),
        ),
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
        Claim(
            title="10. The causal gap at three sizes",
            tables=(gap_table(found["gaps"]), pair_table("gap-pairs", found, GAP_PAIRS)),
        ),
        Claim(title="11. The learning rate", tables=(quality_table("rates", found["rates"]),)),
    ]


def _orders(found: Mapping[str, Findings]) -> Claim:
    pairs = order_pair_table(found, (*TWIN_PAIRS, *CONTROL_PAIRS))
    return Claim(title="What the order of rows changed", tables=(order_table(found), pairs))


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
