"""Quality against throughput of trained models over their depth budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mor.benchmark.arms import Arm
from mor.benchmark.summary import Line
from mor.benchmark.throughput import ENGINE, ArmResult
from mor.evaluate.perplexity import measure_quality, token_byte_lengths
from mor.loading import load_model
from mor.model.calibrate import can_calibrate
from mor.show.figures import Series, line_chart
from mor.show.page import svg_file


def load_arms(path: str, mean_depths: Sequence[float] | None, *, device: str) -> list[Arm]:
    """The model at `path` at each depth budget, by default 1, 1.5, ... R; one arm if it has no router to ask."""
    model, tokenizer = load_model(path, device=device)
    name = path.rstrip("/")
    if not can_calibrate(model):
        return [Arm(name=name, model=model, tokenizer=tokenizer, mean_depth=None, routing="none to ask")]
    halves = range(2, 2 * model.config.num_recursions + 1)
    depths = [half / 2 for half in halves] if mean_depths is None else mean_depths
    arm = Arm(name=name, model=model, tokenizer=tokenizer, mean_depth=None, routing="trained and calibrated")
    return [replace(arm, name=f"{name} at {depth:g}", mean_depth=depth) for depth in depths]


def measure_points(results: Sequence[ArmResult], rows: Sequence[Tensor]) -> list[Line]:
    """Bits per byte on held-out rows (causal decisions) beside the tokens per second of each arm."""
    points: list[Line] = []
    for result in results:
        arm = result.arm
        quality = measure_quality(
            arm.model, rows, token_bytes=token_byte_lengths(arm.tokenizer), budgets=[arm.mean_depth]
        )[0]
        points.append(
            dict(
                arm=arm.name,
                tokens_per_second=round(result.engine.tokens_per_second, 1),
                bits_per_byte=round(quality.bits_per_byte, 4),
                bits_per_byte_error=round(quality.bits_per_byte_error, 4),
                depth_on_text=round(quality.mean_depth, 3),
                depth_generated=result.engine.mean_depth,
                system=ENGINE,
            )
        )
    return points


def pareto_figure(points: Sequence[Line]) -> str:
    """An SVG file: one line per model through its budgets, faster to the right, better below."""
    models: dict[str, list[Any]] = {}
    for point in points:
        models.setdefault(point["arm"].rpartition(" at ")[0] or point["arm"], []).append(point)
    series = [
        Series(
            name=name,
            points=tuple(sorted((p["tokens_per_second"], p["bits_per_byte"]) for p in group)),
            arm=number,
            dots=True,
        )
        for number, (name, group) in enumerate(models.items())
    ]
    title = "quality against throughput, a dot per depth budget: " + ", ".join(models)
    return svg_file(line_chart(series, title=title, x_label="tokens per second", y_label="bits per byte"))
