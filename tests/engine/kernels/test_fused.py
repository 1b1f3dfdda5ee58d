"""The kernels between matrix products against the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.engine import plain_ops
from mor.model.attention import rotate

pytest.importorskip("triton")

from mor.engine.kernels.fused import add_norm, rotate_and_store, swiglu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def within_one_step(out: Tensor, expected: Tensor) -> bool:
    """Whether numbers are equal or neighbours in their dtype."""
    integers = torch.int32 if out.dtype == torch.float32 else torch.int16
    a, b = (each.contiguous().view(integers).long() for each in (out, expected))
    return out.dtype == expected.dtype and bool(((a - b).abs() <= 1).all())


@DTYPES
@pytest.mark.parametrize("size", [960, 64, 37])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm(dtype: torch.dtype, size: int, with_delta: bool, device: torch.device) -> None:
    norm = nn.RMSNorm(size, eps=1e-5).to(device, dtype)
    nn.init.normal_(norm.weight)
    x_ND, delta_ND = (torch.randn(5, size, device=device).to(dtype) for _ in range(2))
    expected_ND = x_ND + delta_ND if with_delta else x_ND.clone()
    given = delta_ND if with_delta else None
    for run in (add_norm, plain_ops.add_norm):
        own_ND = x_ND.clone()
        out_ND, h_ND = run(own_ND, given, norm.weight.detach(), 1e-5)
        assert out_ND.data_ptr() == own_ND.data_ptr() and torch.equal(out_ND, expected_ND)
        torch.testing.assert_close(
            h_ND, norm(expected_ND).detach(), rtol=2e-6 if dtype == torch.float32 else 0.01, atol=0
        )
        if dtype != torch.float32:
            assert within_one_step(h_ND, norm(expected_ND))
            assert (h_ND == norm(expected_ND)).float().mean() > 0.98


def test_add_norm_of_zeros_and_of_no_rows(device: torch.device) -> None:
    weight_D = torch.ones(16, device=device)
    assert not add_norm(torch.zeros(2, 16, device=device), None, weight_D, 1e-5)[1].any()
    assert add_norm(torch.zeros(0, 16, device=device), None, weight_D, 1e-5)[1].shape == (0, 16)


def test_add_norm_refuses_what_it_cannot_read(device: torch.device) -> None:
    x_ND = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="x_ND of shape"):
        add_norm(x_ND.T, None, torch.ones(4, device=device), 1e-5)
    with pytest.raises(ValueError, match="do not match"):
        add_norm(x_ND, None, torch.ones(4, device=device), 1e-5)
    with pytest.raises(ValueError, match="do not match"):
        add_norm(x_ND, torch.randn(4, 4, device=device), torch.ones(8, device=device), 1e-5)


def rotary(num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of random angles, different for the two halves."""
    angle_NE = 6 * torch.rand(num_rows, size, device=device)
    return angle_NE.cos().to(dtype), angle_NE.sin().to(dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "groups", "size"), [(15, 5, 64), (3, 3, 16), (4, 1, 32)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rotate_and_store(
    heads: int, groups: int, size: int, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> None:
    num_rows = 5
    qkv_NC = torch.randn(num_rows, (heads + 2 * groups) * size, device=device).to(dtype)
    cos_NE, sin_NE = rotary(num_rows, size, dtype, device)
    page_N = torch.tensor([3, 0, 1, 3, 2], device=device, dtype=index_dtype)
    place_N = torch.tensor([6, 1, 4, 0, 3], device=device, dtype=index_dtype)
    query_NHE, key_NGE, value_NGE = qkv_NC.unflatten(1, (-1, size)).split((heads, groups, groups), dim=1)
    expected_query = rotate(query_NHE[None], cos_NE[None], sin_NE[None])[0]
    expected_key = rotate(key_NGE[None], cos_NE[None], sin_NE[None])[0]
    for run in (rotate_and_store, plain_ops.rotate_and_store):
        pool = torch.full((5, 3, 2, 7, groups, size), float("nan"), device=device, dtype=dtype)
        expected_pool = pool.clone()
        for n in range(num_rows):
            expected_pool[page_N[n], 1, 0, place_N[n]] = expected_key[n]
            expected_pool[page_N[n], 1, 1, place_N[n]] = value_NGE[n]
        out_NHE = run(qkv_NC, cos_NE, sin_NE, page_N, place_N, pool[:, 1, 0], pool[:, 1, 1], heads)
        assert torch.equal(out_NHE, expected_query)
        assert torch.equal(pool.nan_to_num(nan=9), expected_pool.nan_to_num(nan=9))


def test_queries_alone(device: torch.device) -> None:
    """Without pages, and as a slice of a wider projection."""
    wide_NC = torch.randn(3, 100, device=device)
    cos_NE, sin_NE = rotary(3, 16, torch.float32, device)
    expected = rotate(wide_NC[None, :, :96].unflatten(2, (6, 16)), cos_NE[None], sin_NE[None])[0]
    for run in (rotate_and_store, plain_ops.rotate_and_store):
        assert torch.equal(run(wide_NC[:, :96], cos_NE, sin_NE, None, None, None, None, 6), expected)


def test_rotate_and_store_refuses_what_it_cannot_read(device: torch.device) -> None:
    cos_NE, sin_NE = rotary(2, 16, torch.float32, device)
    qkv_NC = torch.randn(2, 64, device=device)
    with pytest.raises(ValueError, match="does not hold 3 queries and 0 keys"):
        rotate_and_store(qkv_NC, cos_NE, sin_NE, None, None, None, None, 3)
    with pytest.raises(ValueError, match=r"cosines of torch\.float16"):
        rotate_and_store(qkv_NC, cos_NE.half(), sin_NE, None, None, None, None, 4)
    with pytest.raises(ValueError, match="head size 8"):
        rotate_and_store(qkv_NC, cos_NE[:, :8].contiguous(), sin_NE, None, None, None, None, 8)
    pages = torch.zeros(2, 4, 1, 16, device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="page_N of shape"):
        rotate_and_store(qkv_NC, cos_NE, sin_NE, index[:1], index, pages, pages, 2)


@DTYPES
@pytest.mark.parametrize("size", [2560, 24, 1025])
def test_swiglu(dtype: torch.dtype, size: int, device: torch.device) -> None:
    both_N2F = (4 * torch.randn(3, 2 * size, device=device)).to(dtype)
    expected_NF = F.silu(both_N2F[:, :size]) * both_N2F[:, size:]
    assert torch.equal(plain_ops.swiglu(both_N2F), expected_NF)
    out_NF = swiglu(both_N2F)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out_NF, expected_NF, rtol=tolerance, atol=1e-6)
    assert (out_NF == expected_NF).float().mean() > (0.4 if dtype == torch.float32 else 0.99)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_swiglu_of_extremes_and_odd_rows(device: torch.device) -> None:
    both_N2F = torch.tensor([[-200.0, 200.0, 2.0, 3.0]], device=device)
    torch.testing.assert_close(swiglu(both_N2F), torch.tensor([[0.0, 600.0]], device=device))
    assert swiglu(both_N2F[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="do not hold two halves"):
        swiglu(both_N2F[:, :3])
