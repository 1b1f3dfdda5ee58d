"""Layers made of kernels against layers in plain PyTorch."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mor.engine import plain_ops
from tests.engine.decode_rows import AppendingDecodeRows, DecodeRows, decode, decode_model

pytest.importorskip("triton")

from mor.engine.kernels import ops


def with_few_rows(few_rows: int) -> ModuleType:
    named: dict[str, Any] = {name: getattr(ops, name) for name in ops.__all__}
    return cast(ModuleType, SimpleNamespace(**named | {"FEW_ROWS": few_rows}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("few_rows", [0, ops.FEW_ROWS])
@torch.no_grad()
def test_equal_the_plain_ones(few_rows: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """Within the rounding of the dtype, of the size of the outputs."""
    model = decode_model(dtype, device, num_hidden_layers=1)
    expected, _ = decode(model, plain_ops, 2, AppendingDecodeRows, num_tokens=3)
    outs, _ = decode(model, with_few_rows(few_rows), 2, AppendingDecodeRows, num_tokens=3)
    error = (outs.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance


@pytest.mark.parametrize("few_rows", [0, ops.FEW_ROWS])
@torch.no_grad()
def test_attention_in_one_step_changes_no_bit(few_rows: int, device: torch.device) -> None:
    model, layer_ops = decode_model(torch.bfloat16, device, num_hidden_layers=1), with_few_rows(few_rows)
    (apart, _), (at_once, _) = (
        decode(model, layer_ops, 2, kind, num_tokens=3) for kind in (DecodeRows, AppendingDecodeRows)
    )
    assert torch.equal(apart, at_once)
