"""Show how deep each token of a text goes and what the router says of it; or compare runs of `mor train`.

mor show runs/mine "a text" --html depths.html
mor show runs/vanilla runs/mor --out runs.html

Runs may still be going on. The page draws them by tokens, training FLOPs and time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mor.commands.common import add_device, text_argument
from mor.loading import find_model, load_model

if TYPE_CHECKING:
    from mor.evaluate.routing_report import RoutingReport
    from mor.show.tokens import TokenView

AXES = ("tokens", "flops", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mor show MODEL_OR_RUN TEXT [options]\n       mor show RUN [RUN ...] [options]"
    words = "folder of a model or run, then a text (- reads standard input); or folders of runs"
    parser.add_argument("words", nargs="+", metavar="WORD", help=words)
    add_device(parser)
    parser.add_argument("--no-color", action="store_true", help="without colours; a depth is written after its token")
    text = parser.add_argument_group("with a text")
    text.add_argument(
        "--mean-depth", type=float, metavar="M", help="block applications per token (default: the model's)"
    )
    text.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    text.add_argument("--svg", metavar="FILE", help="also write a picture of the text")
    runs = parser.add_argument_group("with runs")
    runs.add_argument("--out", metavar="FILE", help="also write a self-contained page with all curves")
    runs.add_argument("--by", choices=AXES, help="what the plot in the terminal goes by (default: tokens)")


def run(arguments: argparse.Namespace) -> None:
    if _are_runs(arguments.words) or arguments.out:
        _refuse(arguments, "mean_depth", "html", "svg", reason="is for a text; runs take --out and --by")
        _show_runs(arguments)
    else:
        _refuse(arguments, "by", reason="is for runs")
        _show_text(arguments)


def _are_runs(words: list[str]) -> bool:
    """Whether the words are folders of runs, and not a model and a text.

    Raises ValueError for one word that is no run, and for a second that is more likely a mistyped run than a text.
    """
    from mor.show.runs import is_run

    first, last = words[0], words[-1]
    if len(words) > 2 or os.path.isdir(last):
        if len(words) == 1 and not is_run(Path(last)):
            raise ValueError(f"{last} holds no run; to show what a model does, give a text too")
        return True
    if len(words) == 1:
        raise ValueError(f"no such run: {last}")
    looks_like_a_path = os.sep in last and not any(map(str.isspace, last)) and os.path.isdir(os.path.dirname(last))
    if looks_like_a_path and is_run(Path(first)):
        raise ValueError(f"no such run: {last} (a text that looks like a path can come from standard input: -)")
    return False


def _refuse(arguments: argparse.Namespace, *names: str, reason: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


def _show_runs(arguments: argparse.Namespace) -> None:
    from mor.show.run_curves import BITS_PER_BYTE, TRAINING_LOSS, axes, curves
    from mor.show.run_page import write_run_page
    from mor.show.runs import read_runs
    from mor.show.tables import runs_table
    from mor.show.terminal import make_console, print_curves

    runs = read_runs(arguments.words)
    console = make_console(color=False if arguments.no_color else None)
    console.print(runs_table(runs))
    axis = axes(runs)[AXES.index(arguments.by or "tokens")]
    has_curve = any(len(run.evaluations) > 1 for run in runs)
    quantity = BITS_PER_BYTE if has_curve else TRAINING_LOSS
    print_curves(
        curves(runs, quantity, axis), title=f"{quantity.title} ({quantity.unit})", x_label=axis.label, console=console
    )
    if arguments.out:
        print(f"wrote {write_run_page(runs, arguments.out)}")


def _show_text(arguments: argparse.Namespace) -> None:
    import torch

    from mor.evaluate.routing_report import routing_report
    from mor.show.stream import encode, read_tokens
    from mor.show.terminal import make_console, print_reading

    folder, written = arguments.words
    text = text_argument(written)
    model, tokenizer = load_model(folder, device=arguments.device)
    views = read_tokens(model, tokenizer, text, mean_depth=arguments.mean_depth)
    rows = torch.tensor([encode(tokenizer, text)])
    routing = routing_report(model, [rows], mean_depth=arguments.mean_depth)
    console = make_console(color=False if arguments.no_color else None)
    print_reading(views, routing.depth_counts, routing.recursions, console=console)
    _write_files(arguments, views, routing)


def _write_files(arguments: argparse.Namespace, views: list[TokenView], routing: RoutingReport) -> None:
    from mor.files import write_text
    from mor.show.picture import token_picture
    from mor.show.report import Report, write_report

    num_depths = len(routing.depth_counts) - 1
    if arguments.svg:
        write_text(Path(arguments.svg), token_picture(views, num_depths))
        print(f"wrote {arguments.svg}")
    if arguments.html:
        report = Report(
            title="Recursion depths",
            lead=f"What {find_model(arguments.words[0])} does with a text of {len(views)} tokens.",
            num_depths=num_depths,
            tokens=views,
            depth_counts=routing.depth_counts,
            score_bins=[recursion.bins for recursion in routing.recursions],
            thresholds=[recursion.threshold for recursion in routing.recursions],
        )
        print(f"wrote {write_report(report, arguments.html)}")
