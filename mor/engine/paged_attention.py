"""Attention of the rows of a visit over pages: by a kernel on CUDA, elsewhere by gathering what is read.

A row is a token. Rows of one segment stand together and share their pages; a row sees the entries of one virtual
sequence up to a last one of its own.

Legend: M rows of the visit, N rows of a group, X pages of a row, P entries of a page, L entries read, H query heads, G
key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.kv_store import gather_entries
from mor.engine.layers import Pages
from mor.engine.native.few_rows import Seen

Integers = npt.NDArray[np.int64]
AttendSpans = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows `start`..`stop` of one segment at one recursion.

    `pages`: of the virtual sequence that is read. `last`: for each row, the last entry that it sees, ascending.
    `own_pages`, `own_entries`: under hybrid caching, pages of this recursion's own sequence and how many entries it
    has, which are laid over those that are read.
    """

    start: int
    stop: int
    pages: Sequence[int]
    last: Integers
    own_pages: Sequence[int] = ()
    own_entries: int = 0


class PagedScope:
    """What all rows of a visit see; made once and used by all layers.

    `numbers`: which token of its request each entry of a recursion's page is (pages, P).
    """

    def __init__(
        self, spans: Sequence[Span], page_entries: int, numbers: Tensor, attend_spans: AttendSpans | None = None
    ) -> None:
        """`attend_spans`: the kernel, None to gather; entries that lie over others are always gathered."""
        self._tiles: _Tiles | None = None
        if attend_spans is not None and not any(span.own_entries for span in spans):
            self._tiles = _Tiles.of(spans, numbers.device, attend_spans)
            return
        self._spans, self._page_entries, self._numbers = spans, page_entries, numbers

    @cached_property
    def seen(self) -> Seen | None:
        """The same as tables of pages, if nothing lies over them."""
        if self._tiles is not None or any(span.own_entries for span in self._spans):
            return None
        longest = max(_length(span) for span in self._spans)
        counts = [span.stop - span.start for span in self._spans]
        table_TX = _table([span.pages for span in self._spans], -(-longest // self._page_entries), self._numbers)
        return Seen(
            table_TX=table_TX.int(),
            row_N=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            last_N=torch.from_numpy(np.concatenate([span.last for span in self._spans])),
            longest=longest,
        )

    @cached_property
    def _groups(self) -> list[_Group]:
        return [_Group.of(spans, self._page_entries, self._numbers) for spans in _grouped(self._spans)]

    @cached_property
    def _order_M(self) -> Tensor | None:
        """How to bring the groups' rows into order, None if they are."""
        rows = [row for group in self._groups for row in group.rows]
        if all(row == place for place, row in enumerate(rows)):
            return None
        return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), device=self._numbers.device)

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        """The heads' outputs (M, H, E)."""
        if self._tiles is not None:
            return self._tiles.attend(query_MHE, layer)
        outs = [group.attend(query_MHE, layer) for group in self._groups]
        out_MHE = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_MHE if self._order_M is None else out_MHE[self._order_M]


def _length(span: Span) -> int:
    """Entries that its last row sees."""
    return int(span.last[-1]) + 1


def _grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of one row together, longer ones alone."""
    single = [span for span in spans if span.stop - span.start == 1]
    if single:
        yield single
    for span in spans:
        if span.stop - span.start > 1:
            yield [span]


@dataclass(kw_only=True)
class _Group:
    """Spans with as many rows each."""

    rows: list[int]
    num_spans: int
    row_M: Tensor | None
    table_NX: Tensor
    mask_N1KL: Tensor
    own: _Own | None = None

    @classmethod
    def of(cls, spans: Sequence[Span], page_entries: int, numbers: Tensor) -> _Group:
        device = numbers.device
        length = max(_length(span) for span in spans)
        width = -(-length // page_entries)
        last_NK = torch.from_numpy(np.stack([span.last for span in spans])).to(device)
        seen = torch.arange(width * page_entries, device=device) <= last_NK[..., None]
        rows = [row for span in spans for row in range(span.start, span.stop)]
        is_run = rows[-1] - rows[0] == len(rows) - 1
        return cls(
            rows=rows,
            num_spans=len(spans),
            row_M=None if is_run else torch.tensor(rows, device=device),
            table_NX=_table([span.pages[: (_length(span) - 1) // page_entries + 1] for span in spans], width, numbers),
            mask_N1KL=seen[:, None],
            own=_Own.of(spans, page_entries, numbers) if any(span.own_entries for span in spans) else None,
        )

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        key_NLGE, value_NLGE = (gather_entries(pages, self.table_NX) for pages in layer)
        if self.own is not None:
            key_NLGE, value_NLGE = self.own.lay_over(key_NLGE, layer[0]), self.own.lay_over(value_NLGE, layer[1])
        rows = slice(self.rows[0], self.rows[-1] + 1) if self.row_M is None else self.row_M
        query_NHKE = query_MHE[rows].unflatten(0, (self.num_spans, -1)).transpose(1, 2)
        out_NHKE = F.scaled_dot_product_attention(
            query_NHKE,
            key_NLGE.transpose(1, 2).to(query_MHE.dtype),
            value_NLGE.transpose(1, 2).to(query_MHE.dtype),
            attn_mask=self.mask_N1KL,
            enable_gqa=query_MHE.shape[1] != key_NLGE.shape[2],
        )
        return out_NHKE.transpose(1, 2).flatten(0, 1)


@dataclass(kw_only=True)
class _Tiles:
    """Spans as the kernel reads them: a table of pages with a row for each, and tiles of rows."""

    table_TX: Tensor
    tile_W3: Tensor
    last_M: Tensor
    attend_spans: AttendSpans

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, attend_spans: AttendSpans) -> _Tiles:
        from mor.engine.kernels.paged_prefill import cut_tiles

        table = np.zeros((len(spans), max(len(span.pages) for span in spans)), dtype=np.int32)
        for row, span in enumerate(spans):
            table[row, : len(span.pages)] = span.pages
        tiles = cut_tiles([span.start for span in spans], [span.stop for span in spans], np.arange(len(spans)))
        last = np.concatenate([span.last for span in spans])
        return cls(
            table_TX=torch.from_numpy(table).to(device),
            tile_W3=torch.from_numpy(tiles).to(device),
            last_M=torch.from_numpy(last).to(device),
            attend_spans=attend_spans,
        )

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        return self.attend_spans(query_MHE, *layer, self.table_TX, self.tile_W3, self.last_M)


@dataclass(kw_only=True)
class _Own:
    """Entries of the rows' own recursions, and which of the entries that are read each replaces."""

    table_NX: Tensor
    place_NL: Tensor = field(repr=False)

    @classmethod
    def of(cls, spans: Sequence[Span], page_entries: int, numbers: Tensor) -> _Own:
        width = -(-max(span.own_entries for span in spans) // page_entries)
        table_NX = _table([span.own_pages for span in spans], width, numbers)
        count_N = torch.tensor([span.own_entries for span in spans], device=numbers.device)
        absent_NL = torch.arange(width * page_entries, device=numbers.device) >= count_N[:, None]
        return cls(table_NX=table_NX, place_NL=numbers[table_NX].flatten(1).masked_fill(absent_NL, -1))

    def lay_over(self, first_NLGE: Tensor, pages_XPGE: Tensor) -> Tensor:
        own_NLGE = gather_entries(pages_XPGE, self.table_NX)
        beyond = first_NLGE.shape[1]
        place_NL = torch.where((self.place_NL < 0) | (self.place_NL >= beyond), beyond, self.place_NL)
        padded = F.pad(first_NLGE, (0, 0, 0, 0, 0, 1))
        return padded.scatter(1, place_NL[..., None, None].expand_as(own_NLGE), own_NLGE)[:, :beyond]


def _table(pages: Sequence[Sequence[int]], width: int, numbers: Tensor) -> Tensor:
    """Page numbers (N, X), filled up with the blank page, the last one."""
    blank = len(numbers) - 1
    rows = [[*each[:width], *[blank] * (width - len(each))] for each in pages]
    return torch.tensor(rows, dtype=torch.int64, device=numbers.device)
