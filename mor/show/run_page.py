"""The page that compares runs: one self-contained HTML file with their figures, curves and differing options."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mor import __version__
from mor.files import write_text
from mor.show.figures import legend
from mor.show.page import cell, curves_figure, html_page, section
from mor.show.palette import arm_class
from mor.show.run_curves import QUANTITIES, Axis, axes, curves
from mor.show.runs import RUN_COLUMNS, Run, differing_options, run_cells

TABLE_NOTE = (
    "The newest held-out scores of every run; causal: no token is predicted with knowledge of what follows it. Speed "
    "and model FLOPs utilisation (MFU) are medians over log lines. FLOPs: training, by the complete rule, at the "
    "depths that tokens took. NLL can be compared among runs with one tokenizer, bits per byte among runs on one text."
)
CURVES_NOTE = (
    "Expert-choice routers train on top-k choices, which look at the whole sequence: the training losses of such a "
    "model are not comparable with the others, the held-out ones are."
)


def write_run_page(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the page to `path`, whole or not at all, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_run_page(runs))
    return path


def render_run_page(runs: Sequence[Run]) -> str:
    """The page as HTML. Every text in it is escaped; it loads nothing from anywhere."""
    title = "Training runs"
    parts = (
        f'<h1>{title}</h1>\n<p class="lead">{escape(_lead(runs))}</p>',
        _table_section(runs),
        _curves_section(runs),
        _options_section(runs),
        f"<footer>mor {escape(__version__)}</footer>",
    )
    return html_page(title, "\n".join(part for part in parts if part), num_depths=1, has_tokens=False)


def _lead(runs: Sequence[Run]) -> str:
    waiting = [run.name for run in runs if run.share_done < 1]
    says = f"{len(runs)} runs." if len(runs) > 1 else f"The run {runs[0].name}."
    return f"{says} Not at the last step yet: {', '.join(waiting)}." if waiting else says


def _table_section(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{escape(column.header)}<small>{escape(column.unit)}</small></th>" for column in RUN_COLUMNS)
    rows = "".join(
        f"<tr>{_name(run, index)}{''.join(map(cell, row))}</tr>"
        for index, (run, row) in enumerate(zip(runs, run_cells(runs), strict=True))
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("What they reached", TABLE_NOTE, f'<div class="scroll">{table}</div>')


def _name(run: Run, index: int) -> str:
    return f'<th class="name"><span class="swatch {arm_class(index)}"></span>{escape(run.name)}</th>'


def _curves_section(runs: Sequence[Run]) -> str:
    panels = [(axis, _figures(runs, axis)) for axis in axes(runs)]
    panels = [(axis, figures) for axis, figures in panels if figures]
    if not panels:
        return ""
    choices = "".join(_choice(axis, index) for index, (axis, _) in enumerate(panels))
    shown = "".join(f'<div class="panel panel-{index}">{figures}</div>' for index, (_, figures) in enumerate(panels))
    names = legend([run.name for run in runs])
    return section("Curves", CURVES_NOTE, f'<div class="choice">{choices}{names}{shown}</div>')


def _choice(axis: Axis, index: int) -> str:
    """A button that shows one panel: a radio button and its label, which the style sheet does the rest for."""
    checked = "" if index else " checked"
    return (
        f'<input type="radio" name="axis" id="axis-{index}"{checked}>'
        f'<label for="axis-{index}">by {escape(axis.name)}</label>'
    )


def _figures(runs: Sequence[Run], axis: Axis) -> str:
    return "".join(
        curves_figure(curves(runs, quantity, axis), title=quantity.title, unit=quantity.unit, x_label=axis.label)
        for quantity in QUANTITIES
    )


def _options_section(runs: Sequence[Run]) -> str:
    differing = differing_options(runs)
    if not differing:
        return ""
    head = "".join(_name(run, index) for index, run in enumerate(runs))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in differing.items()
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("What differs", "Options that are not alike in all runs.", f'<div class="scroll">{table}</div>')
