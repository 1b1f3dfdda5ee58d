"""The report page: one self-contained HTML file with the comparison, the figures and a text coloured by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mor.files import write_text
from mor.show import figures
from mor.show.comparison import COLUMNS, Arm, cells
from mor.show.figures import Series
from mor.show.numbers import compact, percent
from mor.show.page import both_widths, cell, curves_figure, html_page, section
from mor.show.tokens import TokenView, mean_depth, visible


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """One depth budget of the same weights: the mean depth asked for (None: the default) and reached, quality, cost."""

    requested: float | None
    mean_depth: float
    bits_per_byte: float
    kv_bytes_per_token: float
    flops_per_token: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a page shows; parts left empty are left out.

    `num_depths`: recursions of the model whose tokens are shown. `subject`, `baseline`: names of the arms that the page
    is about and compares with. `depth_counts[d]`: held-out tokens of depth d.
    `score_bins[r][b]` and `thresholds[r]`: router scores of recursion r in equal bins over [0, 1], and what is needed
    to go on. `settings`: headings with their names and values.
    """

    title: str
    lead: str
    num_depths: int
    tokens: Sequence[TokenView]
    text_note: str = ""
    arms: Sequence[Arm] = ()
    subject: str = ""
    baseline: str = ""
    depth_counts: Sequence[int] = ()
    score_bins: Sequence[Sequence[int]] = ()
    thresholds: Sequence[float] = ()
    budgets: Sequence[BudgetPoint] = ()
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    footer: str = ""


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page to `path`, whole or not at all, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_report(report))
    return path


def render_report(report: Report) -> str:
    """The page as HTML. Every text in it is escaped; it loads nothing from anywhere."""
    parts = (
        f'<h1>{escape(report.title)}</h1>\n<p class="lead">{escape(report.lead)}</p>',
        _tiles(report),
        _text_section(report),
        _comparison_section(report),
        _curves_section(report.arms),
        _depth_section(report.depth_counts),
        _score_section(report),
        _budget_section(report.budgets),
        _settings_section(report.settings),
        f"<footer>{escape(report.footer)}</footer>",
    )
    return html_page(report.title, "\n".join(part for part in parts if part), num_depths=report.num_depths)


def _tiles(report: Report) -> str:
    arms = {arm.name: arm for arm in report.arms}
    arm, base = arms.get(report.subject), arms.get(report.baseline)
    if arm is None or base is None:
        return ""
    tiles = (
        (f"{arm.mean_depth:.2f}", f"recursions per token, of {report.num_depths} possible"),
        (percent(arm.parameters / base.parameters), f"of the parameters of the {base.title} model"),
        (percent(arm.flops_per_token / base.flops_per_token), "of its FLOPs per token"),
        (percent(arm.kv_bytes_per_token / base.kv_bytes_per_token), "of its keys and values in memory"),
    )
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in tiles)
    return f'<ul class="tiles">{items}</ul>'


def _text_section(report: Report) -> str:
    chips = "".join(
        f'<span class="key"><span class="chip d{depth}">{depth}</span>{percent(_share_at(report.tokens, depth))}</span>'
        for depth in range(1, report.num_depths + 1)
    )
    mean = mean_depth(report.tokens)
    spans = "".join(_token_span(view) for view in report.tokens)
    return section(
        "A text, token by token",
        f"{report.text_note} The colour of a token is its recursion depth; point at one, or tap it, for its depth and "
        "its probability.",
        f'<div class="bar"><p class="keys"><span>depth</span>{chips}<span>mean {mean:.2f}</span></p>'
        '<button id="numbers" type="button" aria-pressed="false">show depths as numbers</button></div>'
        f'<div class="text" data-depths="{report.num_depths}">{spans}</div>',
    )


def _token_span(view: TokenView) -> str:
    if not view.text:
        return ""
    probability = "" if view.probability is None else f' data-p="{percent(view.probability)}"'
    given = " given" if view.from_prompt else ""
    return (
        f'<span class="t d{view.depth}{given}" data-d="{view.depth}"{probability}>{escape(visible(view.text))}</span>'
    )


def _share_at(tokens: Sequence[TokenView], depth: int) -> float:
    return sum(view.depth == depth for view in tokens) / max(1, len(tokens))


def _comparison_section(report: Report) -> str:
    if not report.arms:
        return ""
    head = "".join(
        f'<th><span class="swatch arm-{index}"></span>{escape(arm.title)}</th>' for index, arm in enumerate(report.arms)
    )
    grid = cells(report.arms, baseline=report.baseline)
    rows = "".join(
        f"<tr><th>{escape(column.header)}<small>{escape(column.unit)}</small></th>"
        f"{''.join(cell(row[index]) for row in grid)}</tr>"
        for index, column in enumerate(COLUMNS)
    )
    base = next(arm for arm in report.arms if arm.name == report.baseline)
    return section(
        "Beside its twins",
        "Trained with the same FLOPs on the same text, with the same settings, once: a demonstration, not a benchmark. "
        "Quality is measured on held-out text and is causal: no token is predicted with knowledge of what follows it. "
        f"Small percentages are of the {base.title} model's value.",
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
    )


def _curves_section(arms: Sequence[Arm]) -> str:
    validation = [Series(name=a.title, points=tuple(a.validation_curve), arm=i, dots=True) for i, a in enumerate(arms)]
    training = [Series(name=a.title, points=tuple(a.training_curve), arm=i, thin=True) for i, a in enumerate(arms)]
    charts = curves_figure(
        validation, title="Causal loss on held-out text", unit="bits per byte", x_label="training FLOPs"
    )
    charts += curves_figure(training, title="Training loss", unit="nats per token", x_label="training FLOPs")
    if not charts:
        return ""
    return section(
        "Loss curves",
        "Against the FLOPs spent on training. Expert-choice routers train on top-k choices, which look at the whole "
        "sequence: the training losses of such a model are not comparable with the others, the held-out ones are.",
        figures.legend([arm.title for arm in arms]) + charts,
    )


def _depth_section(counts: Sequence[int]) -> str:
    if not sum(counts):
        return ""
    return section(
        "How deep tokens go",
        "Share of held-out tokens by the number of times the block was applied to them.",
        both_widths(lambda width: figures.bar_chart(counts, title="Depths of held-out tokens", width=width)),
    )


def _score_section(report: Report) -> str:
    if not report.score_bins:
        return ""
    bins, thresholds = report.score_bins, report.thresholds
    return section(
        "What the router says",
        "Scores of held-out tokens before each recursion, and the threshold above which a token goes on. Two separate "
        "heaps are a router that has made up its mind.",
        both_widths(lambda width: figures.score_chart(bins, thresholds, title="Router scores", width=width)),
    )


def _budget_section(budgets: Sequence[BudgetPoint]) -> str:
    if not budgets:
        return ""
    rows = "".join(
        f"<tr><th>{'default' if point.requested is None else f'{point.requested:g}'}</th>"
        f"<td>{point.mean_depth:.2f}</td><td>{point.bits_per_byte:.3f}</td>"
        f"<td>{compact(point.flops_per_token)}</td><td>{compact(point.kv_bytes_per_token)}</td></tr>"
        for point in budgets
    )
    titles = (
        ("mean depth", "asked for"),
        ("mean depth", "reached"),
        ("causal NLL", "bits/byte"),
        ("FLOPs", "per token"),
        ("KV bytes", "per token"),
    )
    head = "".join(f"<th>{name}<small>{unit}</small></th>" for name, unit in titles)
    return section(
        "The same weights at other budgets",
        "After calibration a caller may ask for any mean depth; the router then picks the tokens that get more.",
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
    )


def _settings_section(settings: Mapping[str, Mapping[str, object]]) -> str:
    if not settings:
        return ""
    lists = "".join(
        f"<h3>{escape(heading)}</h3><dl>"
        + "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
        + "</dl>"
        for heading, values in settings.items()
    )
    return f"<section><h2>Settings and hardware</h2>{lists}</section>"
