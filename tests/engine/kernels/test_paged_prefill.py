"""The prefill kernel against the definition, over chunks that a router has thinned out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.kernels.pages import attend_alone, make_overlay, make_pages, overlay_of

pytest.importorskip("triton")

from mor.engine.kernels.paged_prefill import attend_spans, attend_spans_plain, cut_tiles


def test_tiles_cover_spans_in_order() -> None:
    tiles = cut_tiles([0, 5, 5, 12], [5, 5, 12, 13], [7, 8, 9, 3], tile_rows=3)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [[0, 3, 7], [3, 2, 7], [5, 3, 9], [8, 3, 9], [11, 1, 9], [12, 1, 3]]
    assert cut_tiles([], [], []).shape == (0, 3)


def test_tiles_refuse_spans_that_end_before_they_start() -> None:
    with pytest.raises(ValueError, match=r"spans \[3\] to \[2\]"):
        cut_tiles([3], [2], [0])


@pytest.mark.parametrize(
    ("heads", "groups", "entries", "tile_rows", "index_dtype"),
    [(6, 2, 16, 5, torch.int32), (3, 3, 7, 8, torch.int64), (5, 1, 32, 42, torch.int32)],
)
def test_equals_the_definition(
    heads: int, groups: int, entries: int, tile_rows: int, index_dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [40, 90, 1]
    pages = make_pages(lengths, device=device, entries=entries, groups=groups, index_dtype=index_dtype, width=20)
    # A chunk's survivors; a whole chunk; a row of no tile; a sequence of one entry with a row that sees nothing.
    spans = [(0, 12, 1), (12, 30, 0), (31, 33, 2)]
    lasts = [*range(50, 86, 3), *range(22, 40), 7, 0, -1]
    tile_W3 = torch.from_numpy(cut_tiles(*zip(*spans), tile_rows)).to(device)
    tile_W3 = torch.cat((tile_W3, torch.zeros_like(tile_W3[:1])))
    query_MHE = torch.randn(33, heads, 16, device=device)
    last_M = torch.tensor(lasts, device=device, dtype=index_dtype)
    given = query_MHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX, tile_W3, last_M
    expected_MHE = torch.zeros_like(query_MHE)
    for first, stop, row in spans:
        for m in range(first, stop):
            if lasts[m] >= 0:
                expected_MHE[m] = attend_alone(query_MHE[m], pages, row, lasts[m])
    out_MHE = attend_spans(*given, tile_rows=tile_rows, block=16)
    torch.testing.assert_close(out_MHE, expected_MHE, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attend_spans_plain(*given), expected_MHE, atol=2e-5, rtol=1e-4)


def test_entries_that_lie_over_others_are_read_in_their_stead(device: torch.device) -> None:
    """Each tile at a recursion of its own."""
    lengths = [[60, 40, 7], [90, 90, 30]]
    pages = make_pages([length for each in lengths for length in each], device=device, width=20)
    entry_RXP = make_overlay(pages, lengths)
    spans, at = [(0, 5, 0), (5, 16, 3), (16, 20, 0)], [1, 2, 0]
    tile_W3 = torch.from_numpy(cut_tiles(*zip(*spans), 4)).to(device)
    lasts = [*range(50, 60, 2), *range(60, 71), *range(4)]
    last_M, query_MHE = torch.tensor(lasts, device=device), torch.randn(20, 4, 16, device=device)
    rows = [(row, recursion) for (first, stop, row), recursion in zip(spans, at) for _ in range(first, stop)]
    overlay = overlay_of(entry_RXP, [recursion for _, recursion in rows], torch.int64)
    expected_MHE = torch.stack(
        [attend_alone(query_MHE[m], pages, row, lasts[m], (entry_RXP, r)).float() for m, (row, r) in enumerate(rows)]
    )
    given = query_MHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX, tile_W3, last_M, overlay
    torch.testing.assert_close(attend_spans(*given, tile_rows=4, block=16), expected_MHE, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attend_spans_plain(*given), expected_MHE, atol=2e-5, rtol=1e-4)


def test_half_precision_and_no_tiles(device: torch.device) -> None:
    pages = make_pages([40], device=device, dtype=torch.float16)
    query_MHE = torch.randn(40, 4, 16, device=device).half()
    tile_W3 = torch.from_numpy(cut_tiles([0], [40], [0])).to(device)
    last_M = torch.arange(40, device=device)
    given = query_MHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX
    out_MHE = attend_spans(*given, tile_W3, last_M)
    torch.testing.assert_close(out_MHE, attend_spans_plain(*given, tile_W3, last_M), atol=2e-3, rtol=2e-3)
    assert not attend_spans(*given, tile_W3[:0], last_M).any()


def test_a_row_is_the_same_in_another_tile(device: torch.device) -> None:
    """Bit for bit: entries are read in blocks of a fixed number from the first one on."""
    pages = make_pages([64], device=device)
    query_MHE, last_M = torch.randn(20, 4, 16, device=device), torch.arange(30, 50, device=device)
    given = query_MHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX
    whole = attend_spans(*given, torch.from_numpy(cut_tiles([0], [20], [0], 8)).to(device), last_M, tile_rows=8)
    cut = attend_spans(*given, torch.from_numpy(cut_tiles([0, 5], [5, 20], [0, 0], 8)).to(device), last_M, tile_rows=8)
    assert torch.equal(whole, cut)


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    pages = make_pages([20], device=device)
    query_MHE, last_M = torch.randn(1, 4, 16, device=device), torch.zeros(1, device=device, dtype=torch.int32)
    tile_W3 = torch.tensor([[0, 1, 0]], device=device)
    given = query_MHE, pages.key_XPGE, pages.value_XPGE, pages.table_TX
    with pytest.raises(ValueError, match="not laid out by rows"):
        attend_spans(*given, tile_W3.expand(3, 3).T, last_M)
    with pytest.raises(ValueError, match="block=24 must be a power of two"):
        attend_spans(*given, tile_W3, last_M, block=24)
    with pytest.raises(ValueError, match="last_M of shape"):
        attend_spans(*given, tile_W3, last_M.repeat(2))
