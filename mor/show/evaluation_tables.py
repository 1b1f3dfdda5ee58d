"""What `mor evaluate` found, as tables for a terminal: budgets, parts of the text, and the gap to top-k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from mor.evaluate.evaluation import Evaluation
from mor.evaluate.slices import NORMAL_95, Gap, Slice
from mor.evaluate.suite import SuiteScore
from mor.show.numbers import compact, count, percent

CAPTION = (
    "asked, depth: block applications per token; FLOPs (forward), KV (bytes, bf16): per token.\n"
    "± one standard error over {documents}; 95% is 1.96 of it to either side."
)


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row per budget: mean depth asked for and reached, NLL, bits per byte, perplexity, and cost per token."""
    table = _table("asked", "depth", "NLL", "bits/byte", "perplexity", "FLOPs", "KV")
    for found in evaluations:
        quality = found.quality
        table.add_row(
            _asked(quality.requested),
            f"{quality.mean_depth:.2f}",
            _with_error(quality.nll, quality.nll_error, 4),
            _with_error(quality.bits_per_byte, quality.bits_per_byte_error, 3),
            compact(quality.perplexity, digits=4),
            compact(quality.flops_per_token),
            compact(quality.kv_bytes_per_token),
        )
    number = evaluations[0].total.num_documents
    table.caption = CAPTION.format(documents=f"{number} documents" if number > 1 else "documents needs two of them")
    return table


def parts_table(evaluations: Sequence[Evaluation], by: str, *, at_most: int = 12) -> Table:
    """Bits per byte of the parts by `domain`, `position` or `depth`, a column per budget. The `at_most` first parts of
    the first budget; how many were left out is said below."""
    table = _table(by, "tokens", "documents", *(f"bits/byte at {_asked(e.quality.requested)}" for e in evaluations))
    columns = [{part.name: part for part in found.parts[by]} for found in evaluations]
    names = list(dict.fromkeys(name for column in columns for name in column))
    for name in names[:at_most]:
        first = next(column[name] for column in columns if name in column)
        cells = (_bits(column.get(name)) for column in columns)
        table.add_row(name, count(first.num_tokens), str(first.num_documents), *cells)
    if len(names) > at_most:
        table.caption = f"{len(names) - at_most} smaller ones are in --json."
    return table


def gap_line(requested: float | None, gap: Gap) -> str:
    """The gap of one budget as a sentence."""
    margin = "" if math.isnan(gap.nll_error) else f" ± {NORMAL_95 * gap.nll_error:.4f} (95%)"
    return (
        f"causal gap at {_asked(requested)}: NLL {gap.nll:+.4f}{margin}, {100 * gap.relative:+.2f}% of the causal NLL "
        f"(depth {gap.causal_depth:.2f}; under top_k, which sees later tokens, {gap.top_k_depth:.2f})"
    )


def suite_table(scores: Sequence[SuiteScore]) -> Table:
    """One row per task: accuracy with its standard error, what guessing gives, and the number of items."""
    table = _table("task", "accuracy", "by bytes", "guessing", "items")
    for score in scores:
        accuracy = f"{percent(score.accuracy)} ± {percent(score.accuracy_error)}"
        table.add_row(score.task, accuracy, percent(score.accuracy_by_bytes), percent(score.chance), str(score.items))
    table.caption = "by bytes: the choice with the least bits per byte. ± one standard error over items."
    return table


def _bits(part: Slice | None) -> str:
    return "–" if part is None else _with_error(part.bits_per_byte, part.bits_per_byte_error, 3)


def _asked(requested: float | None) -> str:
    return "default" if requested is None else f"{requested:g}"


def _with_error(value: float, error: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table
