"""Pages hold what was put there, as many bytes as the model's cost says, and no two layers meet in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mor.engine.kv_store import KvStore, Overlay, PageLayout, Reading, gather_entries, lay_over
from mor.model.cost import active_counts, kv_bytes
from tests.tiny import architectures, label, tiny_config


def store_of(page_entries: int = 4, num_pages: int = 5, **config: Any) -> KvStore:
    layout = PageLayout.of(tiny_config(**config), page_entries)
    return KvStore(layout, num_pages, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("architecture", architectures(), ids=label)
def test_pages_are_the_bytes_of_the_cost_model(architecture: dict[str, str]) -> None:
    """With one entry a page nothing is left empty."""
    config = tiny_config(**architecture)
    layout, recursions = PageLayout.of(config, 1), config.num_recursions
    depths = [1 + number % recursions for number in range(24)]
    if config.router == "none":
        depths = [recursions] * 24
    pages = sum(layout.shape.pages(s, length) for s, length in enumerate(layout.shape.lengths(depths)))
    expected = kv_bytes(config, active_counts(depths, recursions), dtype_bytes=4, num_tokens=24)
    assert pages * layout.page_bytes(torch.float32) == expected
    assert layout.shape.one_visit == ("sequence" in architecture["sharing"])


@pytest.mark.parametrize(
    ("num_layers", "page_entries", "outer_entries"), [(5, 8, 4), (8, 8, 8), (11, 8, 12), (5, 1, 1), (11, 1, 1)]
)
def test_pages_of_unshared_layers_hold_as_many_entries_as_their_bytes_allow(
    num_layers: int, page_entries: int, outer_entries: int
) -> None:
    config = tiny_config(num_hidden_layers=num_layers, sharing="middle_cycle")
    layout = PageLayout.of(config, page_entries)
    assert layout.outer_entries == layout.shape.tokens_per_page[-1] == outer_entries
    block, outer = page_entries * config.depth_plan.block_size, outer_entries * 2
    assert layout.elements == 2 * 2 * 8 * max(block, outer)


def test_what_holds_every_token() -> None:
    shapes = {
        kv_cache: PageLayout.of(tiny_config(router="expert_choice", kv_cache=kv_cache), 4).shape
        for kv_cache in ("recursion", "shared", "hybrid")
    }
    assert shapes["recursion"].holds_all == (False, False, False, True)
    assert shapes["shared"].holds_all == shapes["hybrid"].holds_all == (True, False, False, True)
    assert shapes["shared"].written == (True, False, False, True)
    assert shapes["recursion"].written == shapes["hybrid"].written == (True,) * 4


def test_an_empty_page_is_refused() -> None:
    with pytest.raises(ValueError, match="page_entries=0 must be at least 1"):
        PageLayout.of(tiny_config(), 0)


@pytest.mark.parametrize("config", [dict(), dict(router="expert_choice"), dict(sharing="cycle")])
def test_layers_do_not_meet(config: dict[str, Any]) -> None:
    """Block layers among themselves, and unshared layers among themselves: a page is one or the other's."""
    store = store_of(**config)
    assert len(store.block_layers) == store.layout.block_size and len(store.outer_layers) == 2 * store.layout.num_outer
    for layers in (store.block_layers, store.outer_layers):
        views = [view for layer in layers for view in layer]
        for number, view in enumerate(views):
            view.fill_(number)
        assert [view.unique().tolist() for view in views] == [[number] for number in range(len(views))]


def test_pages_do_not_meet() -> None:
    store = store_of(router="expert_choice")
    for page in range(5):
        store.block_layers[1][0][page] = page
    assert [store.block_layers[1][0][page].unique().tolist() for page in range(5)] == [[page] for page in range(5)]


def test_copies_are_whole() -> None:
    store = store_of(router="expert_choice", kv_cache="hybrid")
    for views in (*store.block_layers, *store.outer_layers):
        for view in views:
            view.normal_()
    store.overlay_RXP.random_(-1, 99)
    before = [[view.clone() for view in layer] for layer in (*store.block_layers, *store.outer_layers)]
    overlay = store.overlay_RXP.clone()
    assert overlay.shape == (2, 7, 4)
    store.copy_pages([0, 3], [4, 1])
    source = torch.tensor([0, 3, 2, 3, 0, 5, 6])
    for layer, old in zip((*store.block_layers, *store.outer_layers), before, strict=True):
        for view, was in zip(layer, old, strict=True):
            assert torch.equal(view, was[source])
    assert torch.equal(store.overlay_RXP, overlay[:, source])
    store.copy_pages([], [])
    assert torch.equal(store.overlay_RXP, overlay[:, source])


def test_clearing_pages() -> None:
    """A new owner sees nothing of the old one's; other pages and the blank one stay."""
    store = store_of(router="expert_choice")
    views = [view for layer in (*store.block_layers, *store.outer_layers) for view in layer]
    for view in views:
        view[:-1] = torch.nan
    store.clear_pages(np.array([1, 3]))
    store.clear_pages(np.array([], dtype=np.int64))
    for view in views:
        assert [bool(page.isnan().all()) for page in view] == [True, False, True, False, True, True, False]
        assert not view[[1, 3, 6]].any()


def test_a_copy_is_finite() -> None:
    store = store_of()
    store.block_layers[0][0][0] = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])[:, None, None]
    store.copy_pages([0], [1])
    assert store.block_layers[0][0][1].mean((1, 2)).tolist() == [1, 0, 0, 0]


def test_gathering_follows_the_table() -> None:
    pages_XPGE = torch.arange(4 * 3).view(4, 3, 1, 1)
    gathered = gather_entries(pages_XPGE, torch.tensor([[2, 0], [3, 3]]))
    assert gathered.flatten(1).tolist() == [[6, 7, 8, 0, 1, 2], [9, 10, 11, 9, 10, 11]]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (dict(kv_cache="recursion"), 0),
        (dict(kv_cache="shared"), 0),
        (dict(kv_cache="hybrid"), 2),
        (dict(kv_cache="hybrid", router="none", sharing="middle_sequence"), 2),
        (dict(kv_cache="hybrid", router="none", num_recursions=1, sharing="none"), 0),
    ],
)
def test_only_hybrid_entries_lie_over_others(config: dict[str, Any], count: int) -> None:
    store = store_of(**{"router": "expert_choice", **config})
    assert store.layout.num_overlaying == len(store.overlay_RXP) == count


def test_reading_gives_what_lies_over() -> None:
    """A token of each recursion enters, and then the one of another owner in the place of the first."""
    pages_XPGE = torch.arange(6 * 2).view(6, 2, 1, 1)
    entry_RXP = torch.full((2, 6, 2), 77, dtype=torch.int32)
    table_TX = torch.tensor([[0, 1], [2, 5], [3, 5]])

    def lay(recursion: int, number: int, entry: int) -> None:
        place = torch.tensor([number])
        lay_over(entry_RXP, torch.tensor([recursion]), place // 2, place % 2, torch.tensor([entry]))

    def read(recursion: int, length: int) -> list[int]:
        overlay = Overlay(torch.tensor([recursion]), entry_RXP)
        reading = Reading.of(table_TX, torch.tensor([0]), 2, torch.tensor([length]), overlay)
        return reading(pages_XPGE).flatten().tolist()[:length]

    for number, depth in enumerate((3, 1, 2)):
        for recursion in range(depth):
            lay(recursion, number, entry=sum(d > recursion for d in (3, 1, 2)[:number]))
    assert read(0, 3) == [0, 1, 2]
    assert read(1, 3) == [4, 1, 5]
    assert read(2, 3) == [6, 1, 2] and read(2, 1) == [6]
    lay(0, 0, entry=0)
    assert read(1, 3) == [0, 1, 5] and read(2, 3) == [0, 1, 2]
