"""Attention of the rows of a visit over pages: by a kernel on CUDA, elsewhere by gathering what is read.

A row is a token. Rows of one segment stand together and share their pages; a row sees the entries of one virtual
sequence up to a last one of its own, or what lies over them.

Legend: M rows of the visit, N spans of a group, T rows of a table, X pages of a row, R recursions, P entries of a page,
L entries read, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.engine.kv_store import Overlay, Reading
from mor.engine.layers import Pages
from mor.engine.native.few_rows import Seen
from mor.engine.sending import sent

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
AttendSpans = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows `start`..`stop` of one segment at one recursion.

    `pages`: of the virtual sequence that is read. `last`: for each row, the last entry that it sees, ascending.
    `recursion`, `own_pages`: if it is not 0, the recursion whose entries lie over those that are read, and the pages of
    its sequence.
    """

    start: int
    stop: int
    pages: Sequence[int]
    last: Integers
    recursion: int = 0
    own_pages: Sequence[int] = ()

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Entries that its last row sees."""
        return int(self.last[-1]) + 1


class PagedScope:
    """What all rows of a visit see; made once and used by all layers."""

    def __init__(
        self, spans: Sequence[Span], page_entries: int, overlay_RXP: Tensor, attend_spans: AttendSpans | None = None
    ) -> None:
        """`overlay_RXP`: see `KvStore`. `attend_spans`: the kernel, None to gather."""
        self._spans, self._page_entries, self._overlay_RXP = spans, page_entries, overlay_RXP
        self._tiles = None if attend_spans is None else _Tiles.of(spans, page_entries, overlay_RXP, attend_spans)

    @cached_property
    def seen(self) -> Seen | None:
        """The same as tables of pages, None with a kernel."""
        if self._tiles is not None:
            return None
        tables = _Tables.of(self._spans, self._page_entries, self._overlay_RXP)
        return Seen(
            table_TX=tables.table_TX,
            row_N=tables.row_N.repeat_interleave(tables.count_N),
            last_N=torch.from_numpy(np.concatenate([span.last for span in self._spans])),
            longest=max(span.length for span in self._spans),
            overlay=tables.overlay(each_row=True),
        )

    @cached_property
    def _groups(self) -> list[_Group]:
        return [_Group.of(spans, self._page_entries, self._overlay_RXP) for spans in _grouped(self._spans)]

    @cached_property
    def _order_M(self) -> Tensor | None:
        """How to bring the groups' rows into order, None if they are."""
        rows = [row for group in self._groups for row in group.rows]
        if all(row == place for place, row in enumerate(rows)):
            return None
        return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), device=self._overlay_RXP.device)

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        """The heads' outputs (M, H, E)."""
        if self._tiles is not None:
            return self._tiles.attend(query_MHE, layer)
        outs = [group.attend(query_MHE, layer) for group in self._groups]
        out_MHE = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_MHE if self._order_M is None else out_MHE[self._order_M]


def _grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans of one row together, longer ones alone."""
    single = [span for span in spans if span.count == 1]
    if single:
        yield single
    for span in spans:
        if span.count > 1:
            yield [span]


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """The pages that spans read as rows of a table, on the host. A span's own pages stand as many rows below those that
    it reads as its recursion says.

    `row_N`, `recursion_N`, `count_N`: of each span its row of the table, its recursion and its number of rows.
    """

    table_TX: Tensor
    row_N: Tensor
    recursion_N: Tensor
    count_N: Tensor
    overlay_RXP: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], page_entries: int, overlay_RXP: Tensor) -> _Tables:
        """Rows name the blank page, the last one, behind the pages that they read: the others may hold anything."""
        rows, first = list[Sequence[int]](), list[int]()
        for span in spans:
            first.append(len(rows))
            used = -(-span.length // page_entries)
            own = [()] * (span.recursion - 1) + [span.own_pages[:used]] if span.recursion else []
            rows += [span.pages[:used], *own]
        table = np.full((len(rows), max(map(len, rows))), overlay_RXP.shape[1] - 1, dtype=np.int32)
        for row, pages in enumerate(rows):
            table[row, : len(pages)] = pages
        return cls(
            table_TX=torch.from_numpy(table),
            row_N=torch.tensor(first),
            recursion_N=torch.tensor([span.recursion for span in spans]),
            count_N=torch.tensor([span.count for span in spans]),
            overlay_RXP=overlay_RXP,
        )

    def overlay(self, *, each_row: bool) -> Overlay | None:
        """Of spans, or of each of their rows; None if nothing lies over any."""
        if not bool(self.recursion_N.any()):
            return None
        recursion_N = self.recursion_N.repeat_interleave(self.count_N) if each_row else self.recursion_N
        return Overlay(recursion_N=sent(recursion_N, self.overlay_RXP.device), entry_RXP=self.overlay_RXP)


@dataclass(kw_only=True)
class _Group:
    """Spans with as many rows each."""

    rows: list[int]
    num_spans: int
    row_M: Tensor | None
    reading: Reading
    mask_N1KL: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], page_entries: int, overlay_RXP: Tensor) -> _Group:
        device, tables = overlay_RXP.device, _Tables.of(spans, page_entries, overlay_RXP)
        width = tables.table_TX.shape[1]
        last_NK = torch.from_numpy(np.stack([span.last for span in spans])).to(device)
        seen = torch.arange(width * page_entries, device=device) <= last_NK[..., None]
        rows = [row for span in spans for row in range(span.start, span.stop)]
        is_run = rows[-1] - rows[0] == len(rows) - 1
        where = tables.table_TX.to(device), tables.row_N.to(device), width, last_NK[:, -1] + 1
        return cls(
            rows=rows,
            num_spans=len(spans),
            row_M=None if is_run else torch.tensor(rows, device=device),
            reading=Reading.of(*where, tables.overlay(each_row=False)),
            mask_N1KL=seen[:, None],
        )

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        key_NLGE, value_NLGE = map(self.reading, layer)
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
    """Spans as the kernel reads them: a table of pages, and tiles of rows."""

    table_TX: Tensor
    tile_W3: Tensor
    last_M: Tensor
    overlay: Overlay | None
    attend_spans: AttendSpans

    @classmethod
    def of(cls, spans: Sequence[Span], page_entries: int, overlay_RXP: Tensor, attend_spans: AttendSpans) -> _Tiles:
        from mor.engine.kernels.paged_prefill import cut_tiles

        device, tables = overlay_RXP.device, _Tables.of(spans, page_entries, overlay_RXP)
        tiles = cut_tiles([span.start for span in spans], [span.stop for span in spans], tables.row_N.numpy())
        last = np.concatenate([span.last for span in spans])
        return cls(
            table_TX=sent(tables.table_TX, device),
            tile_W3=sent(torch.from_numpy(tiles), device),
            last_M=sent(torch.from_numpy(last), device),
            overlay=tables.overlay(each_row=True),
            attend_spans=attend_spans,
        )

    def attend(self, query_MHE: Tensor, layer: Pages) -> Tensor:
        return self.attend_spans(query_MHE, *layer, self.table_TX, self.tile_W3, self.last_M, overlay=self.overlay)
