"""Rotating, writing and attending in one kernel, against the two kernels that it stands for: bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mor.engine import plain_ops
from mor.engine.kernels.append_decode import attend_new
from mor.engine.kernels.fused import rotate_and_store
from mor.engine.kernels.paged_decode import attend_pages
from tests.engine.kernels.pages import Pages, make_overlay, make_pages, overlay_of, place_of

SMALL = dict(split=32, tile=16, num_warps=2)
NOBODYS = 0
LENGTHS = [1, 16, 33, 100, 64, 17]


def inputs(
    heads: int, groups: int, size: int, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], Pages]:
    """Projections, rotary positions, and places of rows whose new entries are the last of sequences of `LENGTHS`, but
    for the last two rows: one writes nothing, and one sees nothing either."""
    pages = make_pages(LENGTHS, device=device, groups=groups, size=size, dtype=dtype, index_dtype=index_dtype, width=30)
    rows, lasts = [3, 0, 4, 2, 1, 5], [99, 0, 63, 32, 15, -1]
    page = [int(pages.table_TX[row, last // 16]) for row, last in zip(rows, lasts)]
    page[4] = page[5] = NOBODYS
    qkv_NC = torch.randn(len(rows), (heads + 2 * groups) * size + 8, device=device).to(dtype)
    angle_NE = 6 * torch.rand(len(rows), size, device=device)
    index = [torch.tensor(v, device=device, dtype=index_dtype) for v in (page, [n % 16 for n in lasts], rows, lasts)]
    return (qkv_NC[:, :-8], angle_NE.cos().to(dtype), angle_NE.sin().to(dtype), *index), pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "index_dtype"),
    [(15, 5, 64, torch.int64), (2, 2, 16, torch.int32), (5, 1, 32, torch.int64)],
)
def test_equals_the_two_kernels(
    heads: int, groups: int, size: int, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> None:
    (qkv_NC, cos_NE, sin_NE, page_N, place_N, row_N, last_N), pages = inputs(
        heads, groups, size, dtype, index_dtype, device
    )
    rotary, index = (cos_NE, sin_NE), (page_N, place_N)
    pools = []
    for _ in range(2):
        pool = torch.stack((pages.key_XPGE, pages.value_XPGE), 1).clone()
        for page, place in list(zip(page_N.tolist(), place_N.tolist()))[:4]:
            pool[page, :, place] = float("nan")  # what a row sees of its own entry must be what it writes
        pools.append((pool[:, 0], pool[:, 1], pool))
    query_NHE = rotate_and_store(qkv_NC, *rotary, *index, *pools[0][:2], heads)
    expected = attend_pages(query_NHE, *pools[0][:2], pages.table_TX, row_N, last_N, 100, **SMALL)
    out_NHE = attend_new(qkv_NC, *rotary, *index, *pools[1][:2], pages.table_TX, row_N, last_N, 100, heads, **SMALL)
    assert torch.equal(out_NHE, expected) and bool(expected[:5].any()) and not expected[5].any()
    owned = slice(NOBODYS + 1, None)  # two rows write to nobody's page, in any order
    assert torch.equal(pools[1][2][owned].nan_to_num(nan=9), pools[0][2][owned].nan_to_num(nan=9))


def test_a_new_entry_that_lies_over_the_last_one_is_seen(device: torch.device) -> None:
    """Bit for bit as by two kernels, of one split and of several."""
    lengths, heads, groups = [[100, 70], [20, 6], [40, 2]], 6, 2
    pages = make_pages([length for each in lengths for length in each], device=device, groups=groups, width=30)
    entry_RXP = make_overlay(pages, lengths)
    rows, lasts, recursions = [0, 2, 4, 4], [99, 19, 39, -1], [1, 1, 0, 0]
    at = [
        place_of(pages, row, last, (entry_RXP, recursion)) if last >= 0 else (NOBODYS, 0)
        for row, last, recursion in zip(rows, lasts, recursions)
    ]
    index, seen_index = (
        [torch.tensor(values, device=device) for values in lists] for lists in ([*zip(*at)], [rows, lasts])
    )
    qkv_NC = torch.randn(4, (heads + 2 * groups) * 16, device=device)
    angle_NE, overlay = 6 * torch.rand(4, 16, device=device), overlay_of(entry_RXP, recursions, torch.int64)
    rotary, outs = (angle_NE.cos(), angle_NE.sin()), []
    for one_kernel in (True, False):
        pool = torch.stack((pages.key_XPGE, pages.value_XPGE), 1).clone()
        for page, place in at[:3]:
            pool[page, :, place] = float("nan")
        seen = pool[:, 0], pool[:, 1], pages.table_TX, *seen_index, 100
        if one_kernel:
            outs.append(attend_new(qkv_NC, *rotary, *index, *seen, heads, overlay, **SMALL))
        else:
            query_NHE = rotate_and_store(qkv_NC, *rotary, *index, *seen[:2], heads)
            outs.append(attend_pages(query_NHE, *seen, overlay, **SMALL))
    assert torch.equal(*outs) and bool(outs[0][:3].isfinite().all()) and bool(outs[0][:3].any())
    plain = plain_ops.attend_new(qkv_NC, *rotary, *index, *seen, heads, overlay)
    torch.testing.assert_close(plain, outs[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("longest", [100, 400])
def test_a_row_depends_on_itself_alone(longest: int, device: torch.device) -> None:
    (*tensors, row_N, last_N), pages = inputs(3, 1, 16, torch.float32, torch.int64, device)
    seen = pages.key_XPGE, pages.value_XPGE, pages.table_TX
    together = attend_new(*tensors, *seen, row_N, last_N, 100, 3, **SMALL)
    for n in range(len(row_N)):
        alone = attend_new(
            *(each[n : n + 1] for each in tensors), *seen, row_N[n : n + 1], last_N[n : n + 1], longest, 3, **SMALL
        )
        assert torch.equal(alone[0], together[n])


def test_the_twin_is_close(device: torch.device) -> None:
    (*tensors, row_N, last_N), pages = inputs(4, 2, 16, torch.float32, torch.int64, device)
    seen = pages.key_XPGE, pages.value_XPGE, pages.table_TX, row_N, last_N, 100, 4
    torch.testing.assert_close(attend_new(*tensors, *seen), plain_ops.attend_new(*tensors, *seen), atol=2e-5, rtol=1e-4)


def test_no_rows(device: torch.device) -> None:
    (*tensors, row_N, last_N), pages = inputs(2, 2, 16, torch.float32, torch.int64, device)
    none = [each[:0] for each in tensors]
    seen = pages.key_XPGE, pages.value_XPGE, pages.table_TX
    assert attend_new(*none, *seen, row_N[:0], last_N[:0], 16, 2).shape == (0, 2, 16)


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    (qkv_NC, cos_NE, sin_NE, page_N, place_N, row_N, last_N), pages = inputs(
        4, 2, 16, torch.float32, torch.int64, device
    )
    seen = pages.key_XPGE, pages.value_XPGE, pages.table_TX, row_N, last_N, 100
    with pytest.raises(ValueError, match="does not hold 6 queries and 2 keys"):
        attend_new(qkv_NC, cos_NE, sin_NE, page_N, place_N, *seen, 6)
    with pytest.raises(ValueError, match="page_N of shape"):
        attend_new(qkv_NC, cos_NE, sin_NE, page_N[:2], place_N, *seen, 4)
    with pytest.raises(ValueError, match=r"cosines of torch\.float16"):
        attend_new(qkv_NC, cos_NE.half(), sin_NE, page_N, place_N, *seen, 4)
    half = pages.key_XPGE.half(), pages.value_XPGE.half()
    with pytest.raises(ValueError, match=r"cannot read pages of torch\.float16"):
        attend_new(qkv_NC, cos_NE, sin_NE, page_N, place_N, *half, *seen[2:], 4)
    with pytest.raises(ValueError, match="tile=48"):
        attend_new(qkv_NC, cos_NE, sin_NE, page_N, place_N, *seen, 4, tile=48)
