"""Does training as `mor train` does it on CUDA (compiled, fused loss, bfloat16) follow the eager float32 model?

    python -m bench.loss_curve [--arm mor-3] [--steps 200] [--seeds 3] [--figure curve.svg]

360M dimensions (without a GPU: a small model, compiled in float32), the same text in the same order for every run; a
seed decides the initial weights. For each seed, the reference trains eagerly in float32 with all logits at once, and
ours as on any GPU. Means over windows of 10 steps are compared: the difference between the two ways, and the range over
the reference's seeds. Losses are those of training, under `top_k`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.train_step import ARMS, SIZES
from mor.data.loader import Batch, PackedLoader
from mor.data.shards import TokenShards, write_shards
from mor.data.sources import open_source
from mor.data.tokenizer import load_tokenizer
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.show.figures import Series, line_chart
from mor.show.page import svg_file
from mor.train.compile import compile_layers
from mor.train.fused_loss import ChunkedLmLoss
from mor.train.optim import build_optimizer, clip_gradients
from mor.train.options import OptimizerOptions
from mor.train.step import accumulate_gradients

SMALL: dict[str, Any] = dict(  # without a GPU
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
)
WINDOW = 10
PEAK_RATE = 1e-3
WARMUP_STEPS = 20


def batches(shards: Path, rows: int, length: int) -> Iterator[Batch]:
    """The text, packed."""
    return PackedLoader(TokenShards(shards, "train"), batch_size=rows, sequence_length=length, seed=0)


def losses(arm: str, seed: int, data: Iterator[Batch], steps: int, *, reference: bool) -> list[float]:
    """The language-modelling loss of each step."""
    torch.manual_seed(seed)
    on_cuda = torch.cuda.is_available()
    model: Any = MorForCausalLM(MorConfig(**(SIZES["360m"] | ({} if on_cuda else SMALL) | ARMS[arm])))
    model = model.to("cuda" if on_cuda else "cpu").train()
    if not reference:
        compile_layers(model)
    optimizer, lm_loss = build_optimizer(model, OptimizerOptions()), None if reference else ChunkedLmLoss()
    dtype = torch.bfloat16 if on_cuda and not reference else torch.float32
    found = []
    for step, batch in enumerate(islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        values = accumulate_gradients(model, [batch], dtype=dtype, lm_loss=lm_loss)
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(values["loss/lm"])
    return [float(loss) for loss in found]


def windows(run: list[float]) -> list[float]:
    """Means over windows of steps."""
    return [statistics.fmean(run[start : start + WINDOW]) for start in range(0, len(run), WINDOW)]


def compare(ours: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """How far the means of the two ways are apart, and the reference's seeds among themselves, window by window."""
    columns = [list(zip(*map(windows, runs), strict=True)) for runs in (ours, reference)]
    apart = [abs(statistics.fmean(a) - statistics.fmean(b)) for a, b in zip(*columns, strict=True)]
    between = [max(column) - min(column) for column in columns[1]]
    return {
        "largest_difference": max(apart),
        "mean_difference": statistics.fmean(apart),
        "mean_range_of_seeds": statistics.fmean(between),
        "windows_inside": sum(d <= r for d, r in zip(apart, between)) / len(apart),
        "last_window_ours": statistics.fmean(columns[0][-1]),
        "last_window_reference": statistics.fmean(columns[1][-1]),
        "last_range_of_seeds": between[-1],
    }


def draw(ours: list[list[float]], reference: list[list[float]], tokens_per_step: int) -> str:
    """The curves of all runs as an SVG with its own colours."""
    series = []
    for arm, runs in enumerate((reference, ours)):
        for run in runs:
            points = tuple(((n + 0.5) * WINDOW * tokens_per_step, loss) for n, loss in enumerate(windows(run)))
            series.append(Series(name=("eager float32", "compiled")[arm], arm=arm, points=points, thin=True))
    title = "eager float32, and compiled as `mor train` does: one line per seed"
    return svg_file(line_chart(series, title=title, x_label="training tokens", y_label="loss"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="mor-3", choices=[name for name in ARMS if name != "transformers"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    runs: dict[bool, list[list[float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as place:
        write_shards(open_source("standard-library").documents(), load_tokenizer("byte"), Path(place))
        for reference in (False, True):
            for seed in range(arguments.seeds):
                data = batches(Path(place), arguments.rows, arguments.length)
                runs[reference].append(losses(arguments.arm, seed, data, arguments.steps, reference=reference))
                way = "eager float32" if reference else "compiled"
                print(way, "seed", seed, [round(loss, 4) for loss in runs[reference][-1][::20]], flush=True)
                gc.collect()
                torch._dynamo.reset()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    result = compare(runs[False], runs[True])
    print(result)
    if arguments.figure is not None:
        arguments.figure.write_text(draw(runs[False], runs[True], arguments.rows * arguments.length))
    shown = {f"{'reference' if key else 'ours'}_seed_{n}": run for key in runs for n, run in enumerate(runs[key])}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(dict(benchmark="loss_curve", device=device, arm=arguments.arm,
                          torch=torch.__version__, **result, losses=shown)))  # fmt: skip


if __name__ == "__main__":
    main()
