"""What a terminal shows, with colours and without."""

from __future__ import annotations

import io

from rich.console import Console

from mor.evaluate.routing_report import RecursionScores
from mor.show.palette import depth_swatches
from mor.show.terminal import (
    depth_histogram,
    depth_style,
    depth_text,
    legend,
    print_reading,
    print_stream,
    score_histograms,
    shows_color,
)
from tests.show.examples import tokens


def console(*, color: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=color, color_system="truecolor" if color else None, width=width)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_depths_differ_by_more_than_colour() -> None:
    styles = [depth_style(depth, 3) for depth in (1, 2, 3)]
    assert [style.underline for style in styles] == [False, True, True]
    assert [style.bold for style in styles] == [False, False, True]
    fills = [swatch.fill for swatch in depth_swatches(3, "dark")]
    assert [style.bgcolor and style.bgcolor.name for style in styles] == fills


def test_depth_zero_has_no_background() -> None:
    assert depth_style(0, 3).bgcolor is None


def test_text_marks_line_ends_and_keeps_the_rest() -> None:
    assert depth_text(tokens(), 3).plain == "if a <b>&↵\né"


def test_numbers_are_written_after_tokens_that_have_text() -> None:
    assert depth_text(tokens(), 3, numbers=True).plain == "if a₁ <b>&₂↵\n₃é₁"


def test_legend_names_every_depth() -> None:
    assert legend(3).plain.split("  ")[0] == "recursion depth"
    assert all(f" {depth} " in legend(3).plain for depth in (1, 2, 3))


def test_histogram_shares() -> None:
    lines = depth_histogram((0, 50, 25, 25), width=20).plain.splitlines()
    assert [line.split()[-1] for line in lines] == ["50%", "25%", "25%"]
    assert [len(line) for line in lines] == [8 + 10 + 4, 8 + 5 + 4, 8 + 5 + 4]
    assert depth_histogram((1, 1)).plain.startswith("depth 0")


def test_score_lines() -> None:
    target = console()
    recursions = [
        RecursionScores(bins=(0, 0, 1, 3), quantiles=(), threshold=0.0, share=1.0),
        RecursionScores(bins=(2, 0, 0, 2), quantiles=(), threshold=0.5, share=0.25),
    ]
    target.print(score_histograms(recursions))
    lines = printed(target).splitlines()
    assert lines[0].split() == ["recursion", "1", "▃█", "100%", "enter"]
    assert lines[1].startswith("recursion 2 █ ▾█")
    assert lines[1].endswith("25% enter")


def test_stream_without_colours_is_the_plain_text() -> None:
    out, notes = console(), console()
    shown = print_stream(iter(tokens()), 3, console=out, notes=notes)
    assert printed(out) == "if a <b>&\né\n"
    assert shown == tokens()
    assert printed(notes).split() == "4 tokens, mean depth 1.75 of 3".split()


def test_stream_with_colours() -> None:
    out, notes = console(color=True), console(color=True)
    assert shows_color(out)
    print_stream(iter(tokens()), 3, console=out, notes=notes)
    red, green, blue = (int(depth_swatches(3, "dark")[1].fill[i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in printed(out)
    assert "recursion depth" in printed(notes)


def test_markup_in_a_text_is_only_text() -> None:
    from mor.show.tokens import TokenView

    out = console()
    print_stream(iter([TokenView(text="[bold]x[/bold] :smile:", depth=1)]), 2, console=out, notes=console())
    assert printed(out) == "[bold]x[/bold] :smile:\n"


def test_reading_without_a_router_has_no_scores() -> None:
    out = console()
    print_reading(tokens(), (0, 3, 1, 1), (), console=out)
    text = printed(out)
    assert "mean depth 1.60 of 3, 5 tokens" in text
    assert "depth 3" in text
    assert "score" not in text
    assert "₂" in text
