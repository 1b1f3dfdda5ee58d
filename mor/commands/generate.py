"""Write text after a prompt, every token on the colour of its recursion depth."""

from __future__ import annotations

import argparse

from mor.commands.common import add_device, text_argument
from mor.loading import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or folder of a run")
    parser.add_argument("prompt", metavar="PROMPT", help="text to go on from; - reads standard input")
    parser.add_argument(
        "--mean-depth", type=float, metavar="M", help="block applications per token (default: the model's)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write (default 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: most probable token (default 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="share of probability to draw from (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--no-color", action="store_true", help="plain text")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from mor.show.stream import Sampling, stream_tokens
    from mor.show.terminal import make_console, print_stream

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        mean_depth=arguments.mean_depth,
        seed=arguments.seed,
    )
    prompt = text_argument(arguments.prompt)
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    views = stream_tokens(model, tokenizer, prompt, sampling)
    console = make_console(color=False if arguments.no_color else None)
    notes = make_console(color=False if arguments.no_color else None, stderr=True)
    print_stream(views, model.config.num_recursions, console=console, notes=notes)
