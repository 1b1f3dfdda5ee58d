"""Show how deep each token of a text goes and what the router says of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mor.commands.common import add_device, find_model, load_model, text_argument

if TYPE_CHECKING:
    from mor.evaluate.routing_report import RoutingReport
    from mor.show.tokens import TokenView


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="model folder, or folder of a run")
    parser.add_argument("text", metavar="TEXT", help="text to read; - reads standard input")
    parser.add_argument(
        "--mean-depth", type=float, metavar="M", help="block applications per token (default: the model's)"
    )
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    parser.add_argument("--svg", metavar="FILE", help="also write a picture of the text")
    parser.add_argument("--no-color", action="store_true", help="write each depth after its token instead")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from mor.evaluate.routing_report import routing_report
    from mor.show.stream import encode, read_tokens
    from mor.show.terminal import make_console, print_reading

    text = text_argument(arguments.text)
    model, tokenizer = load_model(arguments.model, device=arguments.device)
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
            lead=f"What {find_model(arguments.model)} does with a text of {len(views)} tokens.",
            num_depths=num_depths,
            tokens=views,
            depth_counts=routing.depth_counts,
            score_bins=[recursion.bins for recursion in routing.recursions],
            thresholds=[recursion.threshold for recursion in routing.recursions],
        )
        print(f"wrote {write_report(report, arguments.html)}")
