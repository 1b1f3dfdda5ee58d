"""Token depths, small charts and curves of runs for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.text import Text

from mor.evaluate.routing_report import RecursionScores
from mor.show.figures import Series
from mor.show.numbers import percent
from mor.show.palette import depth_swatches
from mor.show.plot import line_plot
from mor.show.tokens import TokenView, mean_depth, subscript, visible

BLOCKS = " ▁▂▃▄▅▆▇█"


def depth_style(depth: int, num_depths: int) -> Style:
    """How a token of `depth` looks: on its palette colour, underlined from the second depth on, bold when deepest.

    The backgrounds are those of the dark theme, which read on dark and on light terminals alike. Depth 0 (a token that
    took no recursion) is dim and has none.
    """
    if not 0 < depth <= num_depths:
        return Style(dim=True)
    swatch = depth_swatches(num_depths, "dark")[depth - 1]
    return Style(bgcolor=swatch.fill, color=swatch.ink, underline=depth > 1, bold=1 < depth == num_depths)


def depth_text(views: Iterable[TokenView], num_depths: int, *, numbers: bool = False) -> Text:
    """A text with every token on the colour of its depth; given tokens are dimmed to italics.

    `numbers` writes each depth after its token as a subscript, which needs no colour.
    """
    text = Text(no_wrap=False)
    for view in views:
        append_token(text, view, num_depths, numbers=numbers)
    return text


def append_token(text: Text, view: TokenView, num_depths: int, *, numbers: bool = False) -> Text:
    """Add one token to `text` and return it; line ends are marked and carry no colour past themselves."""
    style = depth_style(view.depth, num_depths) + Style(italic=view.from_prompt)
    if view.text.isspace():
        style += Style(underline=False)
    marked = visible(view.text) + (subscript(view.depth) if numbers and view.text else "")
    for index, line in enumerate(marked.split("\n")):
        if index:
            text.append("\n")
        text.append(line, style)
    return text


def legend(num_depths: int) -> Text:
    """One line that names the depth colours."""
    text = Text("recursion depth  ")
    for depth in range(1, num_depths + 1):
        text.append(f" {depth} ", depth_style(depth, num_depths))
        text.append(" ")
    return text.append(" (italics: the prompt)", "dim")


def depth_histogram(counts: Sequence[int], *, width: int = 32) -> Text:
    """Horizontal bars of the tokens at each depth; `counts[d]` tokens took depth d. Depth 0 only if it occurs."""
    total, text = max(1, sum(counts)), Text()
    for depth in range(0 if counts[0] else 1, len(counts)):
        share = counts[depth] / total
        style = Style(bgcolor=_mark_color(depth, len(counts) - 1))
        text.append(f"depth {depth} ")
        text.append(" " * max(1 if counts[depth] else 0, round(width * share)), style)
        text.append(f" {percent(share)}\n", "bold")
    text.rstrip()
    return text


def score_histograms(recursions: Sequence[RecursionScores]) -> Group:
    """One line of bars per recursion for router scores from 0 to 1; the reversed place is the threshold to go on, and
    the number at the end the share of all tokens that took the recursion."""
    lines: list[RenderableType] = []
    for recursion, scores in enumerate(recursions, start=1):
        lines.append(_score_line(scores, recursion, len(recursions)))
    scale = len(recursions[0].bins) if recursions else 0
    lines.append(Text("            0" + "score".center(max(0, scale - 2)) + "1", "dim"))
    return Group(*lines)


def _score_line(scores: RecursionScores, recursion: int, num_recursions: int) -> Text:
    bins, threshold = scores.bins, scores.threshold
    top = max(max(bins, default=0), 1)
    color = _mark_color(recursion, num_recursions)
    text = Text(f"recursion {recursion} ")
    mark = min(len(bins) - 1, int(threshold * len(bins))) if 0 < threshold < 1 else None
    for index, number in enumerate(bins):
        level = 0 if not number else max(1, round(number / top * (len(BLOCKS) - 1)))
        style = Style(color=color, reverse=index == mark)
        text.append("▾" if index == mark and not level else BLOCKS[level], style)
    return text.append(f" {percent(scores.share)} enter", "dim")


def _mark_color(depth: int, num_depths: int) -> str:
    """A depth's colour for bars: the one its tokens stand on."""
    return depth_swatches(num_depths, "dark")[depth - 1].fill if depth else "#808080"


def make_console(*, color: bool | None = None, stderr: bool = False) -> Console:
    """A console; `color=False` prints plain text, None decides from the terminal and `NO_COLOR`."""
    return Console(no_color=True if color is False else None, stderr=stderr, highlight=False)


def shows_color(console: Console) -> bool:
    """Whether colours reach the reader."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def print_stream(views: Iterable[TokenView], num_depths: int, *, console: Console, notes: Console) -> list[TokenView]:
    """Print tokens as they come and return them; the legend and the mean depth go to `notes`.

    Without colours the text is printed as it is, so that it can be piped.
    """
    colors, shown = shows_color(console), []
    if colors:
        notes.print(legend(num_depths))
    for view in views:
        shown.append(view)
        text = append_token(Text(), view, num_depths) if colors else Text(view.text)
        console.print(text, end="", soft_wrap=True)
    console.print()
    written = [view for view in shown if not view.from_prompt]
    notes.print(f"{len(written)} tokens, mean depth {mean_depth(written):.2f} of {num_depths}", style="dim")
    return shown


def print_reading(
    views: Sequence[TokenView],
    depth_counts: Sequence[int],
    recursions: Sequence[RecursionScores],
    *,
    console: Console,
) -> None:
    """Print a text by depth, then how many tokens are at each depth and what the router's scores were."""
    num_depths = len(depth_counts) - 1
    colors = shows_color(console)
    if colors:
        console.print(legend(num_depths))
    console.print(depth_text(views, num_depths, numbers=not colors), soft_wrap=True)
    console.print(f"\nmean depth {mean_depth(views):.2f} of {num_depths}, {len(views)} tokens\n", style="dim")
    console.print(depth_histogram(depth_counts))
    if recursions:
        console.print()
        console.print(score_histograms(recursions))


def print_curves(series: Sequence[Series], *, title: str, x_label: str, console: Console) -> None:
    """Print a plot of the lines as wide as the terminal, up to 100 columns; nothing when there is none to draw."""
    if any(line.points for line in series):
        width = min(100, console.width)
        console.print(line_plot(series, title=title, x_label=x_label, width=width), soft_wrap=True)
