"""Products of a few rows against the operations they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine import plain_ops

pytest.importorskip("triton")

from mor.engine.kernels.few_rows import MAX_ROWS, linear_small

WIDTH, SIZE = 40, 22


def apart(
    x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, norm_K: Tensor | None, gated: bool, onto: Tensor | None
) -> Tensor:
    """The same, operation by operation, with sums in double precision."""
    dtype = x_NK.dtype
    if norm_K is not None:
        x_NK = F.rms_norm(x_NK, norm_K.shape, norm_K, 1e-3)
    out_NM = x_NK.double() @ weight_MK.double().T
    out_NM = (out_NM if bias_M is None else out_NM + bias_M.double()).to(dtype)
    if gated:
        gate_NF, up_NF = out_NM.chunk(2, dim=1)
        out_NM = F.silu(gate_NF) * up_NF
    return out_NM if onto is None else onto + out_NM


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("normed", "gated", "adds"), [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize(("biased", "dtype", "tolerance"), [(True, torch.float32, 1e-5), (False, torch.bfloat16, 2e-2)])
def test_equals_the_operations_apart(
    rows: int,
    normed: int,
    gated: int,
    adds: int,
    biased: bool,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x_NK, weight_MK = random(rows, WIDTH), random(SIZE * (1 + gated), WIDTH)
    bias_M = random(len(weight_MK)) if biased else None
    norm_K = random(WIDTH) if normed else None
    onto = random(rows, SIZE) if adds else None
    expected = apart(x_NK, weight_MK, bias_M, norm_K, bool(gated), onto)
    for run in (linear_small, plain_ops.linear_small):
        own = None if onto is None else onto.clone()
        out = run(x_NK, weight_MK, bias_M=bias_M, norm_K=norm_K, eps=1e-3, gated=bool(gated), onto_NM=own)
        assert own is None or out.data_ptr() == own.data_ptr()
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("block", [1, 16])
def test_inputs_longer_than_a_chunk(block: int, device: torch.device) -> None:
    x_NK, weight_MK = torch.randn(2, 2560, device=device), torch.randn(5, 2560, device=device)
    out = linear_small(x_NK, weight_MK, block=block)
    torch.testing.assert_close(out, apart(x_NK, weight_MK, None, None, False, None), rtol=1e-4, atol=1e-3)


def test_a_row_depends_on_itself_alone(device: torch.device) -> None:
    x_NK, weight_MK, norm_K = (torch.randn(n, WIDTH, device=device) for n in (MAX_ROWS, SIZE, 1))
    together = linear_small(x_NK, weight_MK, norm_K=norm_K[0])
    for n in range(MAX_ROWS):
        assert torch.equal(linear_small(x_NK[n : n + 1], weight_MK, norm_K=norm_K[0])[0], together[n])


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    x_NK, weight_MK = torch.randn(2, WIDTH, device=device), torch.randn(SIZE, WIDTH, device=device)
    with pytest.raises(ValueError, match="9 rows are more than the 8"):
        linear_small(torch.randn(9, WIDTH, device=device), weight_MK)
    with pytest.raises(ValueError, match="x_NK of shape"):
        linear_small(torch.randn(WIDTH, 2, device=device).T, weight_MK)
    with pytest.raises(ValueError, match="does not take rows of 40"):
        linear_small(x_NK, weight_MK[:, 1:])
    with pytest.raises(ValueError, match="22 features cannot be added"):
        linear_small(x_NK, weight_MK, onto_NM=torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match=r"a bias of shape \(3,\)"):
        linear_small(x_NK, weight_MK, bias_M=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"a norm of shape \(3,\)"):
        linear_small(x_NK, weight_MK, norm_K=torch.zeros(3, device=device))
