"""A finished run as an arm of a comparison: its journal, its cost and its measured quality in one record."""

from __future__ import annotations

import json
from pathlib import Path

from mor.evaluate.perplexity import Quality
from mor.model.configuration_mor import MorConfig
from mor.model.cost import TRAINING_FACTOR, complete_flops, count_parameters
from mor.show.comparison import Arm, Curve
from mor.train.journal import read_journal


def read_arm(folder: Path, *, name: str, title: str, quality: Quality, sequence_length: int) -> Arm:
    """The arm of the run in `folder`, with the quality that was measured on its finished model.

    Training FLOPs: three forward passes, by the complete rule.
    """
    config = MorConfig.from_pretrained(folder / "final")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    per_token = TRAINING_FACTOR * complete_flops(config, sequence_length) / sequence_length
    training, validation = read_curves(folder / "metrics.jsonl", per_token)
    return Arm(
        name=name,
        title=title,
        parameters=count_parameters(config).total,
        flops_per_token=quality.flops_per_token,
        kv_bytes_per_token=quality.kv_bytes_per_token,
        bits_per_byte=quality.bits_per_byte,
        bits_per_byte_error=quality.bits_per_byte_error,
        tokens_per_second=summary["tokens"] / max(summary["seconds"], 1e-9),
        mean_depth=quality.mean_depth,
        num_recursions=config.num_recursions,
        training_tokens=summary["tokens"],
        training_flops=summary["tokens"] * per_token,
        seconds=summary["seconds"],
        training_curve=training,
        validation_curve=validation,
    )


def read_curves(journal: Path, flops_per_token: float) -> tuple[Curve, Curve]:
    """The curves of a metrics.jsonl over training FLOPs: language-modelling loss in nats, and causal bits per byte."""
    training, validation = [], []
    for record in read_journal(journal):
        flops = record["tokens"] * flops_per_token
        if record["kind"] == "training":
            training.append((flops, record["losses"].get("lm", record["loss"])))
        else:
            validation.append((flops, record["decisions"]["causal"]["bits_per_byte"]))
    return tuple(training), tuple(validation)
