"""The decode kernel against the definition: lengths, groups, splits, and what a row may not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mor.engine import plain_ops
from tests.engine.kernels.pages import Pages, attend_alone, make_overlay, make_pages, overlay_of

pytest.importorskip("triton")

from mor.engine.kernels.paged_decode import attend_pages

SMALL = dict(split=32, tile=16, num_warps=2)


def expected(query_NHE: Tensor, pages: Pages, rows: list[int], lasts: list[int]) -> Tensor:
    outs = [
        attend_alone(query_HE, pages, row, last) if last >= 0 else torch.zeros_like(query_HE).double()
        for query_HE, row, last in zip(query_NHE, rows, lasts, strict=True)
    ]
    return torch.stack(outs).to(query_NHE.dtype)


def attend(query_NHE: Tensor, pages: Pages, rows: list[int], lasts: list[int], longest: int, **options: int) -> Tensor:
    index = [torch.tensor(values, device=query_NHE.device, dtype=pages.table_TX.dtype) for values in (rows, lasts)]
    return attend_pages(query_NHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX, *index, longest, **options)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "entries", "index_dtype"),
    [
        (6, 2, 16, 16, torch.int32),
        (15, 5, 64, 16, torch.int64),
        (4, 4, 16, 5, torch.int32),
        (5, 1, 32, 32, torch.int64),
        (14, 2, 16, 40, torch.int32),
    ],
)
def test_equals_the_definition(
    heads: int, groups: int, size: int, entries: int, index_dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [1, 16, 33, 100, 64]
    pages = make_pages(
        lengths, device=device, entries=entries, groups=groups, size=size, index_dtype=index_dtype, width=30
    )
    rows, lasts = [3, 0, 2, 4, 1, 3, 2], [99, 0, 32, 63, 15, 50, -1]
    query_NHE = torch.randn(len(rows), heads, size, device=device)
    out_NHE = attend(query_NHE, pages, rows, lasts, 100, **SMALL)
    torch.testing.assert_close(out_NHE, expected(query_NHE, pages, rows, lasts), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attend(query_NHE, pages, rows, lasts, 100), out_NHE, atol=2e-5, rtol=1e-4)


def test_the_twin_equals_the_definition(device: torch.device) -> None:
    pages = make_pages([40, 7], device=device, groups=3)
    query_NHE = torch.randn(3, 9, 16, device=device)
    index = torch.tensor([0, 1, 0], device=device), torch.tensor([39, 6, -1], device=device)
    out_NHE = plain_ops.attend_pages(query_NHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX, *index, 40)
    torch.testing.assert_close(out_NHE, expected(query_NHE, pages, [0, 1, 0], [39, 6, -1]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("entries", "index_dtype"), [(16, torch.int64), (5, torch.int32)])
def test_entries_that_lie_over_others_are_read_in_their_stead(
    entries: int, index_dtype: torch.dtype, device: torch.device
) -> None:
    """At every recursion, by the kernel and its twin, whatever else is read; bit for bit what a row sees elsewhere."""
    lengths = [[100, 60, 9], [40, 40, 1], [16, 3, 2]]
    pages = make_pages(
        [length for each in lengths for length in each],
        device=device,
        entries=entries,
        index_dtype=index_dtype,
        width=30,
    )
    entry_RXP = make_overlay(pages, lengths)
    rows, lasts, recursions = [0, 3, 0, 6, 0, 3, 0], [99, 39, 99, 15, 50, 20, -1], [1, 2, 0, 1, 2, 1, 0]
    query_NHE = torch.randn(len(rows), 6, 16, device=device)
    each = [
        attend_alone(query_HE, pages, row, last, (entry_RXP, recursion)).to(query_HE.dtype)
        for query_HE, row, last, recursion in zip(query_NHE[:-1], rows, lasts, recursions)
    ]
    seen = pages.key_XPGE, pages.value_XPGE, pages.table_TX
    index = [torch.tensor(values, device=device, dtype=index_dtype) for values in (rows, lasts)]
    overlay = overlay_of(entry_RXP, recursions, index_dtype)
    out_NHE = attend_pages(query_NHE, *seen, *index, 100, overlay, **SMALL)
    torch.testing.assert_close(out_NHE[:-1], torch.stack(each), atol=2e-5, rtol=1e-4)
    assert not out_NHE[-1].any()
    twin_NHE = plain_ops.attend_pages(query_NHE, *seen, *index, 100, overlay)
    torch.testing.assert_close(twin_NHE, out_NHE, atol=2e-5, rtol=1e-4)
    without_NHE = attend_pages(query_NHE, *seen, *index, 100, **SMALL)
    assert [torch.equal(mine, other) for mine, other in zip(out_NHE, without_NHE)] == [r == 0 for r in recursions]
    alone = [torch.tensor([value], device=device, dtype=index_dtype) for value in (0, 99)]
    alone_1HE = attend_pages(
        query_NHE[:1], *seen, *alone, 500, overlay_of(entry_RXP, recursions[:1], index_dtype), **SMALL
    )
    assert torch.equal(alone_1HE[0], out_NHE[0])


def test_a_row_depends_on_itself_alone(device: torch.device) -> None:
    """Bit for bit the same beside other rows, with another bound, and in a wider table."""
    lengths = [20, 70, 300]
    pages = make_pages(lengths, device=device, groups=1, width=40)
    query_NHE = torch.randn(3, 3, 16, device=device)
    together = attend(query_NHE, pages, [0, 1, 2], [19, 69, 299], 300, **SMALL)
    torch.testing.assert_close(together, expected(query_NHE, pages, [0, 1, 2], [19, 69, 299]), atol=2e-5, rtol=1e-4)
    for n, length in enumerate(lengths):
        for longest in (length, 500):
            alone = attend(query_NHE[n : n + 1], pages, [n], [length - 1], longest, **SMALL)
            assert torch.equal(alone[0], together[n]), (n, longest)


def test_very_few_rows_see_the_same_in_larger_tiles(device: torch.device) -> None:
    """Of one split and of several, and each bit for bit the same alone."""
    lengths = [300, 700]
    pages = make_pages(lengths, device=device, groups=1)
    query_NHE = torch.randn(2, 3, 16, device=device)
    for lasts in ([299, 130], [40, 699]):
        together = attend(query_NHE, pages, [0, 1], lasts, max(lasts) + 1)
        torch.testing.assert_close(together, expected(query_NHE, pages, [0, 1], lasts), atol=2e-5, rtol=1e-4)
        for n, last in enumerate(lasts):
            assert torch.equal(attend(query_NHE[n : n + 1], pages, [n], [last], last + 1)[0], together[n])


@pytest.mark.parametrize("longest", [0, 16, 200])
def test_rows_that_see_nothing_are_zeros(longest: int, device: torch.device) -> None:
    pages = make_pages([16], device=device, width=20)
    query_NHE = torch.full((2, 4, 16), float("nan"), device=device)
    assert not attend(query_NHE, pages, [0, 0], [-1, -1], longest, **SMALL).any()


def test_no_rows(device: torch.device) -> None:
    pages = make_pages([16], device=device)
    assert attend(torch.empty(0, 4, 16, device=device), pages, [], [], 16).shape == (0, 4, 16)


def test_large_scores_stay_finite(device: torch.device) -> None:
    pages = make_pages([90], device=device, groups=1)
    query_NHE = 300 * torch.randn(1, 2, 16, device=device)
    out_NHE = attend(query_NHE, pages, [0], [89], 90, **SMALL)
    torch.testing.assert_close(out_NHE, expected(query_NHE, pages, [0], [89]), atol=1e-3, rtol=1e-3)


def test_half_precision(device: torch.device) -> None:
    pages = make_pages([50, 90], device=device, dtype=torch.float16)
    query_NHE = torch.randn(2, 6, 16, device=device).half()
    out_NHE = attend(query_NHE, pages, [0, 1], [49, 89], 90, **SMALL)
    assert out_NHE.dtype == torch.float16
    torch.testing.assert_close(out_NHE, expected(query_NHE, pages, [0, 1], [49, 89]), atol=2e-3, rtol=2e-3)


def test_queries_between_other_channels(device: torch.device) -> None:
    """Queries that are a slice of a wider projection are read where they are."""
    pages = make_pages([20], device=device, groups=1)
    wide_NJE = torch.randn(1, 5, 16, device=device)
    out_NHE = attend(wide_NJE[:, :3], pages, [0], [19], 20, **SMALL)
    assert torch.equal(out_NHE, attend(wide_NJE[:, :3].clone(), pages, [0], [19], 20, **SMALL))


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    pages = make_pages([20], device=device, size=16)
    query_NHE = torch.randn(1, 4, 16, device=device)
    odd = make_pages([20], device=device, size=24)
    with pytest.raises(ValueError, match="head size 24 must be a power of two"):
        attend(torch.randn(1, 4, 24, device=device), odd, [0], [3], 4)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attend(query_NHE[:, :3], pages, [0], [3], 4)
    with pytest.raises(ValueError, match="do not hold a row's heads one after another"):
        attend(query_NHE.transpose(1, 2).contiguous().transpose(1, 2), pages, [0], [3], 4)
    with pytest.raises(ValueError, match="row_N of shape"):
        attend(query_NHE, pages, [0, 0], [3], 4)
    with pytest.raises(ValueError, match=r"queries of torch\.float16 cannot read pages of torch\.float32"):
        attend(query_NHE.half(), pages, [0], [3], 4)
    with pytest.raises(ValueError, match="tile=48 must be a power of two"):
        attend(query_NHE, pages, [0], [3], 4, tile=48, split=96)
    index = torch.zeros(1, device=device, dtype=torch.int32), torch.zeros(1, device=device, dtype=torch.int32)
    seen = query_NHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX, *index, 4
    over = torch.zeros(1, *pages.key_XPGE.shape[:2], device=device, dtype=torch.int32)
    with pytest.raises(ValueError, match="recursion_N of shape"):
        attend_pages(*seen, overlay_of(over, [1, 1], torch.int64))
    with pytest.raises(ValueError, match=r"overlay of shape .* 3 pages of 16 entries"):
        attend_pages(*seen, overlay_of(over[:, :1], [1], torch.int64))
    apart = Pages(key_XPGE=pages.key_XPGE, value_XPGE=pages.value_XPGE.clone(), table_TX=pages.table_TX)
    with pytest.raises(ValueError, match="are not views of one pool"):
        attend(query_NHE, apart, [0], [3], 4)
