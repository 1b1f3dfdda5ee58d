"""The keys and values of all requests in one pool of pages.

A page is a fixed number of bytes and belongs to one virtual sequence of one request: to a recursion, whose block layers
it holds, or to the unshared first and last layers. With fewer layers a page holds more entries.

Under hybrid caching a later recursion reads the first one's entries, and its own in the stead of those whose tokens
have one: its own *lie over* them.

Legend: N rows, R recursions, T rows of a table, X pages, P entries of a page, L entries of a row, G key/value heads, E
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.engine.cache_shape import CacheShape
from mor.engine.sending import sent
from mor.model.configuration_mor import MorConfig


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """How a model's virtual sequences fill pages of `elements` numbers each.

    Sequences 0..R-1 are the recursions; R is that of the unshared layers, if there are any.
    """

    num_outer: int
    block_size: int
    page_entries: int
    heads: int
    head_size: int
    shape: CacheShape

    @classmethod
    def of(cls, config: MorConfig, page_entries: int) -> PageLayout:
        """Pages of `page_entries` entries of a recursion."""
        if page_entries < 1:
            raise ValueError(f"page_entries={page_entries} must be at least 1")
        plan = config.depth_plan
        recursions, outer = plan.num_recursions, plan.num_outer
        entries = [page_entries] * recursions
        everything = [recursion == 0 and config.kv_cache != "recursion" for recursion in range(recursions)]
        written = [recursion == 0 or config.kv_cache != "shared" for recursion in range(recursions)]
        if outer:
            entries.append(max(1, page_entries * plan.block_size // (2 * outer)))
            everything.append(True)
            written.append(True)
        shape = CacheShape(
            num_recursions=recursions,
            tokens_per_page=tuple(entries),
            holds_all=tuple(everything),
            written=tuple(written),
            one_visit=plan.is_sequence,
        )
        assert config.num_key_value_heads is not None and config.head_dim is not None
        return cls(
            num_outer=outer,
            block_size=plan.block_size,
            page_entries=page_entries,
            heads=config.num_key_value_heads,
            head_size=config.head_dim,
            shape=shape,
        )

    @property
    def outer_entries(self) -> int:
        """Entries of a page of the unshared layers; 0 without any."""
        return self.shape.tokens_per_page[-1] if self.num_outer else 0

    @property
    def num_overlaying(self) -> int:
        """Recursions whose entries lie over those of the first: all later ones that write, where every token has one
        in the first."""
        later = self.shape.written[1 : self.shape.num_recursions]
        return sum(later) if self.shape.holds_all[0] else 0

    @property
    def elements(self) -> int:
        """Numbers in a page."""
        entry = 2 * self.heads * self.head_size
        return entry * max(self.page_entries * self.block_size, self.outer_entries * 2 * self.num_outer)

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a page."""
        return self.elements * dtype.itemsize


class KvStore:
    """The pool. `block_layers` and `outer_layers` are views of it: keys and values (pages, P, G, E) of each layer.

    `overlay_RXP`: for each recursion after the first whose entries lie over the first's, and each entry of the first,
    which entry of that recursion's sequence is the same token's, -1 for none. By number and not by page, so that it
    holds for whoever shares or copies the pages.
    """

    def __init__(self, layout: PageLayout, num_pages: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = layout
        # Two pages more than are given out: `nobodys`, where rows write that take no part, and the last, the blank one:
        # always 0, so that it can stand for pages that nobody sees.
        self.nobodys = num_pages
        self._pool = torch.zeros(num_pages + 2, layout.elements, device=device, dtype=dtype)
        overlay = layout.num_overlaying, num_pages + 2, layout.page_entries
        self.overlay_RXP = torch.full(overlay, -1, device=device, dtype=torch.int32)
        self.block_layers = self._views(layout.block_size, layout.page_entries)
        self.outer_layers = self._views(2 * layout.num_outer, layout.outer_entries)

    def _views(self, num_layers: int, entries: int) -> list[tuple[Tensor, Tensor]]:
        shape = num_layers, 2, entries, self.layout.heads, self.layout.head_size
        size = num_layers * 2 * entries * self.layout.heads * self.layout.head_size
        pages = self._pool[:, :size].unflatten(1, shape) if num_layers else self._pool.new_empty(0)
        return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(num_layers)]

    def clear_pages(self, pages: npt.NDArray[np.int64]) -> None:
        """Set pages to 0, as a new owner must: what it does not see yet is multiplied by 0, which NaN survives."""
        if len(pages):
            self._pool.index_fill_(0, sent(torch.from_numpy(pages), self._pool.device), 0)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages, with 0 for what is not finite: entries behind the prefix that the old owner wrote since."""
        if sources:
            source_N, target_N = (sent(torch.tensor(pages), self._pool.device) for pages in (sources, targets))
            copied = self._pool.index_select(0, source_N).nan_to_num_(nan=0, posinf=0, neginf=0)
            self._pool.index_copy_(0, target_N, copied)
            self.overlay_RXP.index_copy_(1, target_N, self.overlay_RXP.index_select(1, source_N))


def gather_entries(pages_XPGE: Tensor, table_NX: Tensor) -> Tensor:
    """The entries (N, L, G, E) of rows whose page numbers are `table_NX`, in order; L is a whole number of pages."""
    rows, width = table_NX.shape
    pages = pages_XPGE.flatten(1).index_select(0, table_NX.flatten())  # copies whole pages, as plain indexing does not
    return pages.view(rows, width * pages_XPGE.shape[1], *pages_XPGE.shape[2:])


class Overlay(NamedTuple):
    """What lies over the entries that rows read: `entry_RXP` is `KvStore.overlay_RXP`, `recursion_N` the recursion of
    each row, whose pages are so many rows of the table below those that it reads."""

    recursion_N: Tensor
    entry_RXP: Tensor


def lay_over(entry_RXP: Tensor, recursion_N: Tensor, page_N: Tensor, place_N: Tensor, entry_N: Tensor) -> None:
    """Tokens whose entries of the first recursion are at (`page_N`, `place_N`) get entries `entry_N` of the sequences
    of their recursions, which lie over them from now on. At the first recursion: nothing lies over them yet."""
    for recursion, entry_XP in enumerate(entry_RXP, 1):
        laid_N = torch.where(recursion_N == recursion, entry_N.int(), entry_XP[page_N, place_N])
        entry_XP[page_N, place_N] = laid_N.masked_fill(recursion_N == 0, -1)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Entries 0..`length_N` (exclusive) that rows read, with what lies over them.

    `table_NX`: pages that are read. `own`: pages (N, X) of the rows' own recursions, and for each entry that is read
    the one of those that lies over it (N, L), -1 for none.
    """

    table_NX: Tensor
    own: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, table_TX: Tensor, row_N: Tensor, width: int, length_N: Tensor, overlay: Overlay | None) -> Reading:
        """The first `width` pages of rows `row_N` of a table."""
        table_NX = table_TX[row_N, :width]
        if overlay is None:
            return cls(table_NX=table_NX, own=None)
        recursion_N, entry_RXP = overlay
        own_NL = entry_RXP[(recursion_N - 1).clamp(min=0)[:, None], table_NX].flatten(1)
        is_read_NL = torch.arange(own_NL.shape[1], device=own_NL.device) < length_N[:, None]
        own_NL = own_NL.masked_fill(~is_read_NL | (recursion_N == 0)[:, None], -1)
        return cls(table_NX=table_NX, own=(table_TX[row_N + recursion_N, :width], own_NL))

    def __call__(self, pages_XPGE: Tensor) -> Tensor:
        """The entries (N, L, G, E); L is a whole number of pages."""
        first_NLGE = gather_entries(pages_XPGE, self.table_NX)
        if self.own is None:
            return first_NLGE
        table_NX, own_NL = self.own
        place_NLGE = own_NL.clamp(min=0).long()[..., None, None].expand_as(first_NLGE)
        own_NLGE = gather_entries(pages_XPGE, table_NX).gather(1, place_NLGE)
        return torch.where((own_NL >= 0)[..., None, None], own_NLGE, first_NLGE)
