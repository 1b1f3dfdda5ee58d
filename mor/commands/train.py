"""Train a model from a recipe (see `mor recipes`) or from an options file; --a.b=c changes any option of either.

mor train demo --out runs/mine
mor train 360m-mor-3 --data fineweb-shards --out runs/360m --training.micro_batch_size=8
mor train --resume --out runs/360m
torchrun --nproc-per-node 8 -m mor train 360m-mor-3 --data fineweb-shards --out runs/360m
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mor.train.loop import TrainResult
    from mor.train.options import RunOptions

DEFAULT_CORPUS = "standard-library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe")
    parser.add_argument("--options", metavar="FILE", help="YAML file with the options of a run, instead of a recipe")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="token shards, or anything that `mor data build` reads (files, folders, hf://..., and several as\n"
        "SOURCE=WEIGHT), which becomes token shards beside the run; 'standard-library' (the demo's\n"
        "default) is text of this Python",
    )
    parser.add_argument("--tokenizer", metavar="T", help="for text: byte, bpe:SIZE (trained on it), a folder or a file")
    parser.add_argument("--out", metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run's folder")


def run(arguments: argparse.Namespace) -> int:
    from mor.config import apply_overrides
    from mor.train.loop import train
    from mor.train.ranks import OtherRankError, join

    options = _base_options(arguments)
    if arguments.out:
        options = dataclasses.replace(options, output=arguments.out)
    options = apply_overrides(options, arguments.overrides)
    try:
        with join(options.training.device) as ranks:
            options = ranks.first(partial(_with_data, options, arguments))
            result = train(options, resume=arguments.resume)
    except OtherRankError:
        return 1  # that rank says what happened
    if ranks.is_first:
        _tell(result)
    if result.interrupted:
        # Stopping when told to is no failure: schedulers send SIGTERM, and torchrun passes it on.
        return 0 if ranks.size > 1 or result.signal == signal.SIGTERM else 130
    return 0


def _tell(result: TrainResult) -> None:
    if result.interrupted:
        print(f"stopped at step {result.step}; go on with: mor train --resume --out {result.folder}")
    else:
        print(f"finished {result.step} steps: {result.model}")


def _base_options(arguments: argparse.Namespace) -> RunOptions:
    from mor.config import from_dict, load_yaml
    from mor.recipes import recipe
    from mor.train.options import RunOptions

    if arguments.recipe and arguments.options:
        raise ValueError(f"give a recipe or --options, not both: {arguments.recipe!r} and {arguments.options!r}")
    if arguments.recipe:
        return recipe(arguments.recipe)
    if arguments.options:
        return load_yaml(RunOptions, arguments.options)
    if arguments.resume and arguments.out:
        path = Path(arguments.out) / "options.json"
        if not path.is_file():
            raise FileNotFoundError(f"{arguments.out} holds no run to resume: it has no options.json")
        return from_dict(RunOptions, json.loads(path.read_text(encoding="utf-8")))
    raise ValueError("give the name of a recipe (`mor recipes` lists them), --options FILE, or --resume --out DIR")


def _with_data(options: RunOptions, arguments: argparse.Namespace) -> RunOptions:
    """The options with a folder of token shards: the one given, or one made from the text given, beside the run."""
    from mor.recipes import DEMO_VOCABULARY, is_demo

    source, tokenizer = arguments.data, arguments.tokenizer
    if source is None:
        if not is_demo(arguments.recipe) or (arguments.resume and Path(options.data.path).exists()):
            if not options.data.path:
                raise ValueError("there is nothing to train on: give --data PATH")
            return options
        source = [DEFAULT_CORPUS]
    if len(source) == 1 and (Path(source[0]) / "manifest.json").is_file():
        folder = source[0]
    else:
        folder = f"{options.output.rstrip('/')}-data"
        _make_shards(source, tokenizer or (f"bpe:{DEMO_VOCABULARY}" if is_demo(arguments.recipe) else "byte"), folder)
    return dataclasses.replace(options, data=dataclasses.replace(options.data, path=str(folder)))


def _make_shards(sources: list[str], tokenizer: str, folder: str) -> None:
    from rich.console import Console

    from mor.data.build_progress import BuildProgress
    from mor.data.shards import build_shards
    from mor.data.sources import open_mixture
    from mor.data.tokenizer import load_tokenizer, train_bpe

    opened = open_mixture(sources)
    kind, colon, size = tokenizer.partition(":")
    if kind == "bpe" and colon:
        if not size.isdigit():
            raise ValueError(f"--tokenizer {tokenizer!r}: expected bpe:SIZE with a number of tokens, such as bpe:2048")
        built = train_bpe(opened.documents(), int(size))
    else:
        built = load_tokenizer(tokenizer)
    with BuildProgress(Console(stderr=True)) as progress:
        build_shards(opened, built, folder, validation_fraction=0.02, progress=progress)
