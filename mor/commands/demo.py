"""Train a small MoR beside its vanilla and recursive twins, on text of this Python, and show what it learned."""

from __future__ import annotations

import argparse
import os

# Threads of a small model wait for each other thousands of times a second. Busy waiting, the default, makes that a
# little faster on an idle machine and many times slower when another process wants a core.
SPINS = "200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder to fill (default runs/demo)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="what it may take (default 5)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the MoR model, instead of a time")
    parser.add_argument("--data", metavar="PATH", help="text to train on instead (text, JSON lines or parquet)")
    parser.add_argument("--prompt", metavar="TEXT", help="what the generated text begins with")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to write (default 180)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the tokenizer (default 2048)")
    parser.add_argument("--evaluation-tokens", type=int, metavar="N", help="held-out tokens to score (default 24576)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and drawing (default 0)")


def run(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from mor.demo import DemoOptions, run_demo
    from mor.show.terminal import make_console

    given = {name: value for name, value in vars(arguments).items() if value is not None and name != "overrides"}
    run_demo(DemoOptions(**given), make_console())
