"""Arms, tokens and reports made by hand, for the tests of what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mor.show.comparison import Arm
from mor.show.report import BudgetPoint, Report
from mor.show.tokens import TokenView


def arm(name: str, **changes: Any) -> Arm:
    values: dict[str, Any] = {
        "name": name,
        "title": name,
        "parameters": 1000,
        "flops_per_token": 2e6,
        "kv_bytes_per_token": 512.0,
        "bits_per_byte": 2.5,
        "bits_per_byte_error": 0.02,
        "tokens_per_second": 4000.0,
        "mean_depth": 1.0,
        "num_recursions": 1,
        "training_tokens": 100_000,
        "training_flops": 6e11,
        "seconds": 25.0,
        "training_curve": ((1e11, 7.0), (2e11, 5.5), (6e11, 5.0)),
        "validation_curve": ((3e11, 2.9), (6e11, 2.5)),
    }
    return Arm(**values | changes)


def arms() -> list[Arm]:
    return [
        arm("mor", title="MoR", parameters=600, flops_per_token=1.5e6, mean_depth=2.0, num_recursions=3),
        arm("vanilla", bits_per_byte=2.4),
        arm("recursive", parameters=600, mean_depth=3.0, num_recursions=3),
    ]


def tokens() -> list[TokenView]:
    return [
        TokenView(text="if a", depth=1, from_prompt=True),
        TokenView(text=" <b>&", depth=2, probability=0.25),
        TokenView(text="\n", depth=3, probability=0.0001),
        TokenView(text="", depth=1, probability=0.5),
        TokenView(text="é", depth=1, probability=0.5),
    ]


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "title": "A <title>",
        "lead": "Lead & more",
        "num_depths": 3,
        "tokens": tokens(),
        "text_note": "Note <i>.",
        "arms": arms(),
        "subject": "mor",
        "baseline": "vanilla",
        "depth_counts": (0, 5, 3, 2),
        "score_bins": ((0, 0, 0, 10), (4, 1, 0, 5), (3, 0, 0, 2)),
        "thresholds": (0.0, 0.5, 0.5),
        "budgets": [
            BudgetPoint(requested=1.5, mean_depth=1.52, bits_per_byte=2.6, kv_bytes_per_token=400, flops_per_token=1e6)
        ],
        "settings": {"Model <x>": {"layers": "8 < 9", "router": "expert_choice"}},
        "footer": "Foot > er",
    }
    return Report(**values | changes)


def training_line(step: int, *, loss: float = 2.0, seconds: float | None = None, **changes: Any) -> dict[str, Any]:
    """A training line of a run that reads 100 tokens at 1e6 FLOPs each in a step of ten seconds."""
    line = {
        "kind": "training",
        "step": step,
        "tokens": 100 * step,
        "loss": loss + 0.5,
        "losses": {"lm": loss},
        "flops": 1e8 * step,
        "tokens_per_second": 10.0,
        "mfu": 0.4,
        "peak_memory_gib": 1.5,
        "seconds": 10.0 * step if seconds is None else seconds,
    }
    return line | changes


def evaluation_line(step: int, *, nll: float = 3.0) -> dict[str, Any]:
    scores = {"nll": nll, "bits_per_byte": nll / 2, "mean_depth": 1.75, "tokens": 64}
    return {"kind": "evaluation", "step": step, "tokens": 100 * step, "decisions": {"causal": scores}}


def write_run(folder: Path, *lines: dict[str, Any], options: dict[str, Any] | None = None) -> Path:
    """A run folder of 100 planned steps with these lines in its journal."""
    folder.mkdir(parents=True)
    values = {"output": str(folder), "model": {"router": "none"}, "training": {"steps": 100, "seed": 0}}
    (folder / "options.json").write_text(json.dumps(values | (options or {})))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
