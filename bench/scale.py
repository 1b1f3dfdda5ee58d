"""Throughput of one training run on one GPU and on several, through `torchrun -m mor train`.

    python -m bench.scale [--recipe 360m-mor-3] [--gpus 2] [--steps 40]

The same step everywhere: 16 rows of 2,048 tokens per GPU at a time, as many rows in all; text of this Python, byte
tokens in a vocabulary of 49,152. Tokens/s are those of the run's own journal, median of the log lines after the first
third. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mor.data.shards import write_shards
from mor.data.sources import open_source
from mor.data.tokenizer import load_tokenizer


def train(folder: Path, shards: Path, *, recipe: str, parallel: str, gpus: int, steps: int, rows: int) -> float:
    """Train and return tokens/s."""
    options = {
        "model.vocab_size": 49152,
        "training.parallel": parallel,
        "training.steps": steps,
        "training.micro_batch_size": 16,
        "training.gradient_accumulation_steps": rows // 16,
        "training.log_interval": 5,
        "training.evaluation_tokens": 0,
        "training.evaluation_interval": 0,
        "training.calibration_tokens": 0,
        "training.checkpoint_interval": 0,
        "schedule.warmup_steps": 5,
        "schedule.decay_steps": 5,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    command = [*launch, "-m", "mor", "train", recipe, "--data", str(shards), "--out", str(folder)]
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "training"]
    return statistics.median(speeds[len(speeds) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="360m-mor-3")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    arms = [("none", 1), ("ddp", arguments.gpus), ("fsdp", arguments.gpus)]
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "shards"
        write_shards(open_source("standard-library").documents(), load_tokenizer("byte"), shards)
        for parallel, gpus in arms:
            name = f"{parallel}-{gpus}"
            shared = dict(recipe=arguments.recipe, steps=arguments.steps, rows=16 * arguments.gpus)
            results[name] = train(Path(place) / name, shards, parallel=parallel, gpus=gpus, **shared)
            print(
                f"{name}: {results[name]:,.0f} tokens/s, {results[name] / results['none-1']:.3f} of one GPU", flush=True
            )
    device = torch.cuda.get_device_name()
    print(json.dumps(dict(benchmark="scale", device=device, recipe=arguments.recipe, tokens_per_second=results)))


if __name__ == "__main__":
    main()
