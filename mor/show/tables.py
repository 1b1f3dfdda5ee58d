"""Tables for a terminal: the comparison of models and of runs, measured quality, recipes, and token shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mor.data.manifest import Manifest
from mor.evaluate.perplexity import Quality
from mor.recipes import RecipeSummary
from mor.show.comparison import COLUMNS, Arm, Cell, cells
from mor.show.numbers import compact, count
from mor.show.plot import mark
from mor.show.runs import RUN_COLUMNS, Run, run_cells


def comparison_table(arms: Sequence[Arm], *, baseline: str) -> Table:
    """MoR beside its twins; the best of each row is bold, percentages are of the baseline's value."""
    table = _table("", *(arm.title for arm in arms))
    grid = cells(arms, baseline=baseline)
    for index, column in enumerate(COLUMNS):
        name = Text(f"{column.header} ").append(column.unit, "dim")
        table.add_row(name, *(_cell_text(row[index]) for row in grid))
    return table


def quality_table(results: Sequence[Quality]) -> Table:
    """One row per budget: mean depth asked for and reached, NLL, bits per byte, perplexity, and cost per token."""
    table = _table("asked", "depth", "NLL", "bits/byte", "perplexity", "FLOPs", "KV bytes")
    for quality in results:
        table.add_row(
            "default" if quality.requested is None else f"{quality.requested:g}",
            f"{quality.mean_depth:.2f}",
            f"{quality.nll:.4f}",
            f"{quality.bits_per_byte:.3f}{_error(quality.bits_per_byte_error)}",
            compact(quality.perplexity, digits=4),
            compact(quality.flops_per_token),
            compact(quality.kv_bytes_per_token),
        )
    table.caption = "asked, depth: block applications per token; FLOPs (forward) and KV bytes (bf16) per token."
    return table


def runs_table(runs: Sequence[Run]) -> Table:
    """One row per run: how far it is, its newest held-out scores, speed and memory. The best of a column is bold."""
    shown = [number for number, column in enumerate(RUN_COLUMNS) if not column.only_on_page]
    table = _table("", *(RUN_COLUMNS[number].header for number in shown))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for index, (run, row) in enumerate(zip(runs, run_cells(runs), strict=True)):
        table.add_row(mark(index).append(f" {run.name}", "default"), *(_cell_text(row[number]) for number in shown))
    table.caption = "NLL (nats), bits/byte, depth: newest, causal.\ntok/s, MFU: medians; GiB: peak memory."
    return table


def recipe_table(summaries: Sequence[RecipeSummary]) -> Table:
    """One row per recipe: its shape, its size and what it spends."""
    table = _table("recipe", "layers", "router", "parameters", "steps", "tokens", "FLOPs")
    for summary in summaries:
        table.add_row(
            summary.name,
            f"{summary.num_unique_layers} as {summary.num_layers}",
            summary.router.removesuffix("_choice"),
            count(summary.parameters),
            f"{summary.steps:,}",
            count(summary.tokens),
            f"{summary.flops:.2e}".replace("e+", "e"),
        )
    table.caption = (
        "layers: stored, as applied to a token that takes every recursion.\nparameters: unique, without embeddings.\n"
        "FLOPs: forward, by the paper's rule (demo: by the complete rule)."
    )
    return table


def manifest_table(manifest: Manifest) -> Table:
    """One row per split of a folder of token shards."""
    table = _table("split", "documents", "tokens", "UTF-8 bytes", "bytes/token", "shards")
    for name, split in manifest.splits.items():
        per_token = split.utf8_bytes / max(1, split.tokens)
        numbers = (f"{split.documents:,}", f"{split.tokens:,}", f"{split.utf8_bytes:,}", f"{per_token:.2f}")
        table.add_row(name, *numbers, str(len(split.shards)))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _cell_text(cell: Cell) -> Text:
    text = Text()
    if cell.relative:
        text.append(f"{cell.relative}  ", "dim")
    text.append(cell.text, "bold" if cell.best else "")
    return text.append(f" {cell.error}", "dim") if cell.error else text


def _error(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.3f}"
