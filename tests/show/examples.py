"""Arms, tokens and reports made by hand, for the tests of what is shown."""

from __future__ import annotations

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
