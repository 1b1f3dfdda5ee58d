"""Runs of a few seconds: token shards made on the spot, a tiny model, and options for both."""

from __future__ import annotations

import random
from pathlib import Path

from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from mor.train.options import DataOptions, OptimizerOptions, RunOptions, ScheduleOptions, TrainingOptions

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_recursions": 3,
    "sharing": "middle_cycle",
    "router": "expert_choice",
    "num_calibration_points": 5,
}
WORDS = "the block reads a token again until its router says that it has seen enough".split()


def make_shards(folder: Path, *, documents: int = 200) -> Path:
    """Token shards of made-up sentences, at `folder`."""
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(5, 60))) for _ in range(documents)]
    write_shards(texts, byte_tokenizer(), folder, validation_fraction=0.1)
    return folder


def tiny_options(
    output: Path, shards: Path, *, model: dict | None = None, data: dict | None = None, **training
) -> RunOptions:
    """Twelve steps of two micro-batches, a log line every third, a checkpoint every fourth; `training` overrides."""
    settings = dict(
        steps=12,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        sequence_length=32,
        log_interval=3,
        evaluation_interval=6,
        evaluation_tokens=256,
        calibration_tokens=256,
        checkpoint_interval=4,
        device="cpu",
    )
    return RunOptions(
        output=str(output),
        model=MODEL | (model or {}),
        data=DataOptions(path=str(shards), **(data or {})),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        schedule=ScheduleOptions(warmup_steps=2),
        training=TrainingOptions(**(settings | training)),
    )
