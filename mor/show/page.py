"""The frame of an HTML page: style sheet, script and colours are written into it, so it needs nothing from outside.

And the parts that pages are made of: sections, cells of tables, and figures drawn for a desktop and for a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources

from mor.show.comparison import Cell
from mor.show.figures import Series, line_chart
from mor.show.palette import ARM_COLORS, Theme, depth_swatches

WIDE, NARROW = 710, 316  # pixels: the card on a desktop, and on a phone of 375

_COLORS: dict[Theme, dict[str, str]] = {
    "light": {
        "page": "#f6f7f9",
        "card": "#ffffff",
        "ink": "#1a1f27",
        "muted": "#5a6472",
        "line": "#dfe3e9",
        "accent": "#5b4bd6",
        "best": "#edebfc",
    },
    "dark": {
        "page": "#101317",
        "card": "#181c22",
        "ink": "#e8ebf0",
        "muted": "#a0a9b6",
        "line": "#2c333d",
        "accent": "#a79cff",
        "best": "#2b2749",
    },
}


def html_page(title: str, body: str, *, num_depths: int, has_tokens: bool = True) -> str:
    """A whole page around `body`, which must be safe HTML.

    `has_tokens`: it has one element of class `text` and a button `numbers`, which a script brings to life.
    """
    script = f'<div id="tip" role="status"></div>\n<script>\n{_resource("report.js")}</script>' if has_tokens else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style_sheet(num_depths)}</style></head>\n"
        f"<body><main>\n{body}\n</main>\n{script}</body></html>\n"
    )


def svg_file(figure: str) -> str:
    """A figure as a file of its own, with the colours of a page."""
    style = f'xmlns="http://www.w3.org/2000/svg"><style>{style_sheet(1)}</style>'
    return figure.replace(">", f' {style}<rect width="100%" height="100%" fill="var(--card)"/>', 1)


def section(heading: str, note: str, content: str) -> str:
    """A card with a heading, a note in plain text, and safe HTML."""
    return f'<section><h2>{escape(heading)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def cell(content: Cell) -> str:
    """A table cell; the best of its column is marked."""
    value = f'<span class="best">{escape(content.text)}</span>' if content.best else escape(content.text)
    small = "".join(f"<small>{escape(note)}</small>" for note in (content.error, content.relative) if note)
    return f"<td>{value}{small}</td>"


def both_widths(draw: Callable[[int], str]) -> str:
    """What `draw` makes of a width, for a desktop and for a phone; the style sheet shows one of them."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def curves_figure(series: Sequence[Series], *, title: str, unit: str, x_label: str) -> str:
    """The curves in both widths; nothing when no series has a point."""
    if not any(line.points for line in series):
        return ""

    def draw(width: int) -> str:
        height = 300 if width == WIDE else 250
        return line_chart(series, title=title, x_label=x_label, y_label=f"{title} ({unit})", width=width, height=height)

    return both_widths(draw)


def style_sheet(num_depths: int) -> str:
    """The whole style sheet for depths 1..`num_depths`, in light and dark colours."""
    light, dark = _variables("light", num_depths), _variables("dark", num_depths)
    root = f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    return root + _resource("report.css") + _depth_rules(num_depths) + _arm_rules()


def _resource(name: str) -> str:
    return (resources.files("mor.show") / name).read_text(encoding="utf-8")


def _variables(theme: Theme, num_depths: int) -> str:
    colors = dict(_COLORS[theme])
    for depth, swatch in enumerate(depth_swatches(num_depths, theme), start=1):
        colors |= {f"d{depth}": swatch.fill, f"i{depth}": swatch.ink}
    colors |= {f"a{index}": color for index, color in enumerate(ARM_COLORS[theme])}
    return f"color-scheme: {theme}; " + " ".join(f"--{name}: {color};" for name, color in colors.items())


def _depth_rules(num_depths: int) -> str:
    """Fill, ink and underline of each depth: the underline thickens with depth, so that colour is not the only sign."""
    rules = []
    for depth in range(1, num_depths + 1):
        line = 0.0 if num_depths == 1 else 2.5 * (depth - 1) / (num_depths - 1)
        rules.append(
            f".d{depth} {{ background: var(--d{depth}); color: var(--i{depth}); "
            f"box-shadow: inset 0 -{line:.2g}px 0 currentColor; }}\n"
            f".figure .depth-{depth} {{ fill: var(--d{depth}); stroke: var(--muted); stroke-width: .5; }}\n"
        )
    return "".join(rules)


def _arm_rules() -> str:
    return "".join(
        f".line.arm-{i} {{ stroke: var(--a{i}); }} .dot.arm-{i} {{ fill: var(--a{i}); }} "
        f".swatch.arm-{i} {{ background: var(--a{i}); }}\n"
        for i in range(len(ARM_COLORS["light"]))
    )
