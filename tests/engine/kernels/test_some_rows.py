"""Products of tens of rows against the operations they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mor.engine import plain_ops

pytest.importorskip("triton")

from mor.engine.kernels import some_rows
from mor.engine.kernels.some_rows import MAX_ROWS, linear_some
from tests.engine.kernels.test_few_rows import apart

WIDTH, SIZE = 40, 22


@pytest.mark.parametrize("rows", [9, 33])
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
    for run in (linear_some, plain_ops.linear_small):
        own = None if onto is None else onto.clone()
        out = run(x_NK, weight_MK, bias_M=bias_M, norm_K=norm_K, eps=1e-3, gated=bool(gated), onto_NM=own)
        assert own is None or out.data_ptr() == own.data_ptr()
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=10 * tolerance)


def test_rounds_after_each_operation(device: torch.device) -> None:
    def quarters(*shape: int) -> Tensor:
        return (torch.randint(-16, 16, shape, device=device) / 4).bfloat16()

    x_NK, weight_MK, onto_NM = quarters(20, WIDTH), quarters(2 * SIZE, WIDTH), quarters(20, SIZE)
    expected = apart(x_NK, weight_MK, None, None, True, onto_NM)  # all sums are exact in any order
    assert torch.equal(linear_some(x_NK, weight_MK, gated=True, onto_NM=onto_NM), expected)


@pytest.mark.parametrize(("block", "num_warps"), [(16, 8), (32, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_inputs_longer_than_a_chunk(block: int, num_warps: int, normed: bool, device: torch.device) -> None:
    x_NK, weight_MK = torch.randn(17, 1352, device=device), torch.randn(5, 1352, device=device)
    norm_K = torch.randn(1352, device=device) if normed else None
    out = linear_some(x_NK, weight_MK, norm_K=norm_K, eps=1e-3, block=block, num_warps=num_warps)
    torch.testing.assert_close(out, apart(x_NK, weight_MK, None, norm_K, False, None), rtol=1e-4, atol=1e-3)


def test_a_row_depends_on_itself_alone(device: torch.device) -> None:
    x_NK, weight_MK, norm_K = (torch.randn(n, WIDTH, device=device) for n in (32, SIZE, 1))
    together = linear_some(x_NK, weight_MK, norm_K=norm_K[0])
    assert torch.equal(linear_some(x_NK[:17], weight_MK, norm_K=norm_K[0]), together[:17])
    others = torch.cat([x_NK[:5], torch.full((27, WIDTH), float("nan"), device=device)])
    assert torch.equal(linear_some(others, weight_MK, norm_K=norm_K[0])[:5], together[:5])
    assert torch.equal(linear_some(x_NK.flip(0), weight_MK, norm_K=norm_K[0]).flip(0), together)


def test_no_rows_are_nothing_to_do(device: torch.device) -> None:
    assert linear_some(torch.zeros(0, WIDTH, device=device), torch.zeros(SIZE, WIDTH, device=device)).shape == (0, SIZE)


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    x_NK, weight_MK = torch.randn(9, WIDTH, device=device), torch.randn(SIZE, WIDTH, device=device)
    with pytest.raises(ValueError, match="65 rows are more than the 64"):
        linear_some(torch.randn(MAX_ROWS + 1, WIDTH, device=device), weight_MK)
    with pytest.raises(ValueError, match="x_NK of shape"):
        linear_some(torch.randn(WIDTH, 9, device=device).T, weight_MK)
    with pytest.raises(ValueError, match="does not take rows of 40"):
        linear_some(x_NK, weight_MK[:, 1:])
    with pytest.raises(ValueError, match="22 features cannot be added"):
        linear_some(x_NK, weight_MK, onto_NM=torch.zeros(9, 3, device=device))
    with pytest.raises(ValueError, match=r"a bias of shape \(3,\)"):
        linear_some(x_NK, weight_MK, bias_M=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match=r"a norm of shape \(3,\)"):
        linear_some(x_NK, weight_MK, norm_K=torch.zeros(3, device=device))


@pytest.mark.parametrize(
    ("row_bytes", "rows", "programs", "expected"),
    [
        (1920, 32 + 16, 100, 3),  # both chunks at once
        (5120, 32 + 16, 60, 5),  # four of five: as much as fits
        (5120, 64 + 16, 60, 3),
        (1920, 64 + 32, 160, 2),  # two programs share a multiprocessor
        (1 << 20, 1024, 1, 2),
    ],
)
def test_stages_are_as_many_as_fit(row_bytes: int, rows: int, programs: int, expected: int) -> None:
    assert some_rows._stages(row_bytes, rows, programs, 1024) == expected
