"""Find the score thresholds for every mean depth on real text and store them with the model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mor.commands.common import add_device
from mor.loading import find_model, load_model

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or folder of a run")
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="text like that of use: token shards, or text files"
    )
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="tokens to look at (default 65536)")
    parser.add_argument("--mean-depth", type=float, metavar="M", help="also make this the model's default budget")
    parser.add_argument("--out", metavar="DIR", help="where to write the model (default: in its place)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="round the weights to this first (default: as they are)"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from mor.evaluate.text import open_rows
    from mor.files import new_folder
    from mor.model.calibrate import calibrate
    from mor.quiet import without_progress_bars

    source = find_model(arguments.model)
    target = Path(arguments.out) if arguments.out else source
    if arguments.out and target.exists():
        raise ValueError(f"{target} already exists; choose another --out or remove it")
    model, tokenizer = load_model(source, device=arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else model.dtype
    computed_in = model.dtype
    torch.nn.Module.to(torch.nn.Module.to(model, dtype), computed_in)
    length = model.config.max_position_embeddings
    rows = open_rows(arguments.data, tokenizer, batch_size=8, sequence_length=length, max_tokens=arguments.tokens)
    found = calibrate(model, rows)
    if arguments.mean_depth is not None:
        router = model.model.recursion.router
        assert router is not None
        router.thresholds(arguments.mean_depth)  # an error if out of reach
        model.config.mean_depth = arguments.mean_depth
    torch.nn.Module.to(model, dtype)
    with new_folder(target, replace=True) as folder, without_progress_bars():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        model.save_pretrained(folder)
    low, high = float(found.mean_depths.min()), float(found.mean_depths.max())
    print(f"calibrated on {found.num_tokens:,} tokens: mean depths {low:.2f} to {high:.2f} can be asked of {target}")
