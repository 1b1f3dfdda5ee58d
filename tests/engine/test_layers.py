"""The engine's layers against the model's own, whatever they are made of."""

from __future__ import annotations

import pytest
import torch

from mor.engine import plain_ops
from tests.engine.decode_rows import AppendingDecodeRows, DecodeRows, as_written, decode, decode_model

CPU = torch.device("cpu")
KINDS = (DecodeRows, AppendingDecodeRows)
CHANGES = [{}, dict(hidden_act="gelu"), dict(attention_bias=True, mlp_bias=True)]


@pytest.mark.parametrize("few_rows", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", CHANGES, ids=["silu", "gelu", "biases"])
@torch.no_grad()
def test_equal_the_models_own(
    changes: dict[str, object], kind: type[DecodeRows], few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows and of few, with attention in two steps and in one."""
    monkeypatch.setattr(plain_ops, "FEW_ROWS", few_rows)
    model = decode_model(torch.float64, CPU, **changes)
    for bias in (parameter for name, parameter in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias)
    expected = as_written(model, 3)
    outs, _ = decode(model, plain_ops, 3, kind)
    torch.testing.assert_close(outs, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few_rows", [0, 2])
@torch.no_grad()
def test_rows_that_only_read_leave_the_pages_alone(
    kind: type[DecodeRows], few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_ops, "FEW_ROWS", few_rows)
    model = decode_model(torch.float64, CPU)
    written, pool = decode(model, plain_ops, 2, kind)
    read, read_pool = decode(model, plain_ops, 2, kind, last_reads=True)
    assert torch.equal(read[:-1], written[:-1]) and not torch.equal(read[-1], written[-1])
    assert not read[-1].isnan().any()
    num_written = [int((~each.isnan()).sum()) for each in (pool, read_pool)]
    assert num_written[1] == num_written[0] * 9 // 10


@torch.no_grad()
def test_few_rows_take_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products a layer with attention among them; norms are parts of these."""
    steps: list[str] = []

    def watch(name: str) -> None:
        run = getattr(plain_ops, name)
        monkeypatch.setattr(plain_ops, name, lambda *a, **k: (steps.append(name), run(*a, **k))[1])

    monkeypatch.setattr(plain_ops, "FEW_ROWS", 2)
    for name in ("add_norm", "swiglu", "linear_small"):
        watch(name)
    model = decode_model(torch.float32, CPU)
    decode(model, plain_ops, 2, AppendingDecodeRows)
    num_layers = 10 * len(model.model.recursion.block)
    assert steps.count("linear_small") == 4 * num_layers and "add_norm" not in steps
    steps.clear()
    decode(model, plain_ops, 3, AppendingDecodeRows)
    assert "linear_small" not in steps and steps.count("add_norm") == 2 * num_layers
