"""A text coloured by depth as a picture of its own: one SVG file that follows the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mor.show.palette import Theme, depth_swatches
from mor.show.tokens import TokenView, visible

CELL, LINE, MARGIN = 8.4, 24, 14  # pixels: a character's width at 14 px, a line's height, the border
_PAGE: dict[Theme, tuple[str, str]] = {"light": ("#ffffff", "#5a6472"), "dark": ("#181c22", "#a0a9b6")}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A piece of one token that stands on one line: characters from `column`, on `line`."""

    text: str
    depth: int
    line: int
    column: int
    given: bool


def token_picture(views: Sequence[TokenView], num_depths: int, *, columns: int = 92) -> str:
    """The tokens in lines of `columns` characters, with a legend below, as SVG."""
    runs = list(_layout(views, columns))
    lines = 1 + max((run.line for run in runs), default=0)
    width, height = 2 * MARGIN + round(columns * CELL), 2 * MARGIN + LINE * lines + 30
    body = "".join(map(_draw, runs)) + _legend(num_depths, MARGIN + LINE * lines + 22)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="A text coloured by recursion depth" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n<style>{_style(num_depths)}</style>\n'
        f'<rect class="page" width="{width}" height="{height}" rx="10"/>\n{body}</svg>\n'
    )


def _layout(views: Iterable[TokenView], columns: int) -> Iterator[Run]:
    line = column = 0
    for view in views:
        for index, part in enumerate(_printable(visible(view.text)).split("\n")):
            if index:
                line, column = line + 1, 0
            while part:
                if column >= columns:
                    line, column = line + 1, 0
                piece, part = part[: columns - column], part[columns - column :]
                yield Run(text=piece, depth=view.depth, line=line, column=column, given=view.from_prompt)
                column += len(piece)


def _printable(text: str) -> str:
    """`text` without what XML cannot hold or a character cell cannot show."""
    shown = text.replace("\t", "    ")
    return "".join(character if character == "\n" or character.isprintable() else "·" for character in shown)


def _draw(run: Run) -> str:
    x, y = MARGIN + run.column * CELL, MARGIN + run.line * LINE
    size = len(run.text) * CELL
    text = escape(run.text.replace(" ", "\u00a0"))
    given = " given" if run.given else ""
    return (
        f'<rect class="d{run.depth}" x="{x:.1f}" y="{y + 2}" width="{size:.1f}" height="{LINE - 4}" rx="3"/>'
        f'<text class="i{run.depth}{given}" x="{x:.1f}" y="{y + 17}" textLength="{size:.1f}">{text}</text>\n'
    )


def _legend(num_depths: int, y: int) -> str:
    parts, x = [f'<text class="note" x="{MARGIN}" y="{y}">recursion depth</text>'], MARGIN + 110
    for depth in range(1, num_depths + 1):
        parts.append(
            f'<rect class="d{depth}" x="{x}" y="{y - 14}" width="22" height="19" rx="3"/>'
            f'<text class="i{depth}" x="{x + 7}" y="{y}">{depth}</text>'
        )
        x += 30
    return "".join(parts) + f'<text class="note" x="{x + 8}" y="{y}">italics: the prompt</text>\n'


def _style(num_depths: int) -> str:
    base = (
        "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}.note{font:13px system-ui,sans-serif}"
    )
    light, dark = _colors("light", num_depths), _colors("dark", num_depths)
    return f"{base}.given{{font-style:italic}}.d0{{fill:none}}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _colors(theme: Theme, num_depths: int) -> str:
    page, note = _PAGE[theme]
    rules = [f".page{{fill:{page}}}.note,.i0{{fill:{note}}}"]
    for depth, swatch in enumerate(depth_swatches(num_depths, theme), start=1):
        rules.append(f".d{depth}{{fill:{swatch.fill}}}.i{depth}{{fill:{swatch.ink}}}")
    return "".join(rules)
