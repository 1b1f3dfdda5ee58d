"""Tables of studies that were run with both orders of rows: batches of neighbouring rows, and rows in random order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mor.study.results import Findings, Spread, losses, paired
from mor.study.tables import Pair, Table, by_seed, difference, seeds, sides, spread


def order_table(found: Mapping[str, Findings]) -> Table:
    """Causal NLL of every arm in both orders; a cell of several studies stands once."""
    rows = dict[tuple[str, ...], tuple[str, ...]]()
    for findings in found.values():
        before = findings.earlier
        for arm, budget in dict.fromkeys((run.arm, run.budget) for run in findings.study.runs):
            old, new = before.of(arm, budget), findings.of(arm, budget)
            if change := paired(losses(new), losses(old)):
                both = [spread(Spread.of([nll for _, nll in losses(group)])) for group in (old, new)]
                shared = sorted({r["seed"] for r in new} & {r["seed"] for r in old})
                rows.setdefault((budget, arm), (*both, difference(change), seeds(shared)))
    head = ("budget", "arm", "neighbouring rows", "random order", "change", "seeds")
    return Table(name="orders", head=head, rows=tuple((*cell, *told) for cell, told in rows.items()))


def order_pair_table(found: Mapping[str, Findings], pairs: Sequence[Pair]) -> Table:
    """Differences seed by seed, in both orders; pairs that were not run in both are left out."""
    before, rows = {name: findings.earlier for name, findings in found.items()}, []
    for pair in pairs:
        old, new = sides(before, pair), sides(found, pair)
        if old and new:
            rows.append((pair.what, pair.cell.arm, pair.other.arm, *by_seed(old), *by_seed(new)))
    head = ("what differs", "arm", "less", "neighbouring rows, by seed", "mean", "random order, by seed", "mean")
    return Table(name="order-pairs", head=head, rows=tuple(rows))
