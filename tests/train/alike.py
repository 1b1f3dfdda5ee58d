"""Comparing runs that are the same up to rounding, and saying where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from mor.train.state import TrainingState


def assert_values_alike(one: dict[str, list[float]], other: dict[str, list[float]], tolerance: float) -> None:
    """Measurements step by step, relative above 1; norms within ten times `tolerance`."""
    assert one.keys() == other.keys(), "what was measured"
    for name in one:
        allowed = tolerance * (10 if "norm" in name else 1)
        pairs = enumerate(zip(one[name], other[name], strict=True))
        far = [(step, a, b) for step, (a, b) in pairs if not abs(a - b) <= allowed * max(1.0, abs(a))]
        assert not far, f"{name} differs by more than {allowed:g} in {len(far)} steps; (step, one, other): {far[:3]}"


def assert_alike(one: TrainingState, other: TrainingState, tolerance: float) -> None:
    """Measurements of all steps, the router's over all, and weights and buffers: their distance relative to their size
    within 20 times `tolerance`, integers equal."""
    assert_values_alike(one.window.values(), other.window.values(), tolerance)
    summary, another = one.window.summary(), other.window.summary()
    assert_values_alike(*({"depth histogram": s["depth_histogram"]} for s in (summary, another)), tolerance)
    tensors, others = one.model.state_dict(), other.model.state_dict()
    far = {name: distance for name in tensors if (distance := _distance(tensors[name], others[name])) > 20 * tolerance}
    assert not far, f"weights or buffers differ, relative to their size: {far}"


def _distance(one: Tensor, other: Tensor) -> float:
    """Between 0 and infinity; NaN and infinities are equal to their like alone."""
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    one, other = (tensor.detach().double() for tensor in (one, other))
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one[~finite].nan_to_num(7), other[~finite].nan_to_num(7)):
        return float("inf")
    return float((one - other)[finite].norm() / one[finite].norm().clamp(min=1e-6))
