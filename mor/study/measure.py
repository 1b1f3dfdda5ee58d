"""What is kept of a finished run: its cost, and its quality at every budget and under every rule worth comparing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mor.config import to_dict
from mor.evaluate.causality import suffix_probe
from mor.evaluate.evaluation import Evaluation, evaluate_text
from mor.evaluate.perplexity import measure_quality, token_byte_lengths
from mor.evaluate.recursion_scaling import can_scale, recursion_scaling
from mor.evaluate.text import HeldOut, open_held_out
from mor.loading import load_model
from mor.model.calibrate import can_calibrate
from mor.model.cost import TRAINING_FACTOR, complete_flops, count_parameters
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import rows_at_once
from mor.study.grid import Measurement, StudyRun
from mor.study.places import Places
from mor.study.provenance import provenance
from mor.train.journal import read_journal
from mor.train.options import RunOptions

VERSION = 4
"""Of results that can be compared. 3: thresholds from rows at equal distances; 4: trained on rows in random order."""

PROBE_TOKENS, PROBE_SUFFIXES = 128, 32


def measure_run(run: StudyRun, options: RunOptions, places: Places, *, jobs: int = 1) -> dict[str, Any]:
    """Everything that is kept of a finished run: small enough to lie in a repository, and all that figures need.

    `jobs`: runs that shared the machine, without which seconds mean nothing.
    """
    folder = Path(options.output)
    model, tokenizer = load_model(folder, device=options.training.device)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    length = options.training.sequence_length
    text = open_held_out(
        [places.held_out or places.data], tokenizer, sequence_length=length, max_tokens=run.measurement.tokens
    )
    parameters, training = count_parameters(model.config), summary["training"] or {}
    return {
        "version": VERSION,
        "key": run.key,
        "provenance": dataclasses.asdict(provenance(places.data, places.held_out, model.device)),
        "options": to_dict(dataclasses.replace(options, output=run.key)),
        "parameters": {"total": parameters.total, "non_embedding": parameters.unique_non_embedding},
        "training": {
            "tokens": summary["tokens"],
            "seconds": summary["seconds"],
            "jobs": jobs,
            "flops": TRAINING_FACTOR * complete_flops(model.config, length) / length * summary["tokens"],
            "peak_memory_gib": _peak_memory(folder / "metrics.jsonl"),
            "loss": training.get("losses", {}).get("lm", training.get("loss")),
        },
        **measure_model(model, text, token_byte_lengths(tokenizer), run.measurement),
        "curve": _curve(folder / "metrics.jsonl"),
    }


def measure_model(
    model: MorForCausalLM, text: HeldOut, token_bytes: torch.Tensor, measurement: Measurement
) -> dict[str, Any]:
    """Quality on held-out text.

    `own`: at the model's own budget, with the gap to `top_k`. `dial`: at other budgets. `fixed`: under the rule of a
    model without thresholds, 0.5, and None where there is no such choice. `scaling`: when every token takes the same
    number of recursions, by that number. `probe`: whether changed suffixes moved earlier predictions, which they must
    not.
    """
    size = rows_at_once(model, text.rows_NT.shape[1])
    few_NT = text.rows_NT[:: max(1, round(text.rows_NT.numel() / measurement.dial_tokens))]
    rows, few = list(text.rows_NT.split(size)), list(few_NT.split(size))
    (own,) = evaluate_text(model, text, token_bytes=token_bytes, batch_size=size, with_gap=True)
    dial, fixed, scaling = list[Any](), None, list[Any]()
    if can_calibrate(model):
        depths = measurement.mean_depths(model.config.num_recursions)
        dial = measure_quality(model, few, token_bytes=token_bytes, budgets=depths)
        fixed = _without_thresholds(model, rows, token_bytes)
    if can_scale(model):
        scaling = [dataclasses.asdict(point) for point in recursion_scaling(model, few, beyond=measurement.beyond)]
    return {
        "own": _evaluation(own),
        "dial": [_quality(quality) for quality in dial],
        "fixed": None if fixed is None else _quality(fixed),
        "scaling": scaling,
        "probe": _probe(model, text.rows_NT[0]),
    }


def _probe(model: MorForCausalLM, row_T: torch.Tensor) -> dict[str, Any]:
    with _exact_products():
        found = suffix_probe(model, row_T[:PROBE_TOKENS], num_suffixes=PROBE_SUFFIXES)
    return {"causal": found.causal, **dataclasses.asdict(found)}


@contextmanager
def _exact_products() -> Iterator[None]:
    """Without TensorFloat32, whose rounding is far above what the probe allows when shapes change."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _without_thresholds(model: MorForCausalLM, rows: list[torch.Tensor], token_bytes: torch.Tensor) -> Any:
    """Quality under the rule of a model that was never calibrated."""
    depth, model.config.mean_depth = model.config.mean_depth, None
    try:
        return measure_quality(model, rows, token_bytes=token_bytes)[0]
    finally:
        model.config.mean_depth = depth


def _evaluation(found: Evaluation) -> dict[str, Any]:
    gap = None if found.gap is None else _quality(found.gap)
    position = {part.name: round(part.nll, 5) for part in found.by_position}
    return {
        **_quality(found.quality),
        "num_documents": found.total.num_documents,
        "gap": gap,
        "nll_by_position": position,
    }


def _quality(found: Any) -> dict[str, Any]:
    return {name: _finite(value) for name, value in dataclasses.asdict(found).items()}


def _finite(value: Any) -> Any:
    """Not-a-number as None, which JSON can hold."""
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _peak_memory(journal: Path) -> float | None:
    """Of training alone: until the first evaluation, which takes more."""
    peak = None
    for record in read_journal(journal):
        if record["kind"] == "evaluation":
            break
        peak = record["peak_memory_gib"]
    return peak


def _curve(journal: Path) -> list[tuple[int, float]]:
    """Tokens and causal NLL of the evaluations while training."""
    return [
        (record["tokens"], round(record["decisions"]["causal"]["nll"], 5))
        for record in read_journal(journal)
        if record["kind"] == "evaluation" and "causal" in record["decisions"]
    ]
