"""What several sub-commands need: reading numbers and text from the command line."""

from __future__ import annotations

import argparse
import sys


def text_argument(text: str) -> str:
    """`text` itself, or standard input for `-`."""
    return sys.stdin.read() if text == "-" else text


def depth_list(text: str) -> list[float]:
    """`1,1.5,2` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1,1.5,2") from None


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    parser.add_argument("--device", default="auto", help="auto (CUDA if present, else CPU), cpu, cuda, cuda:1, ...")
