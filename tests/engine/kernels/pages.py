"""Pages of random keys and values with sequences laid over them in random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mor.engine.kv_store import Overlay

UNREAD = 10**6
"""In an overlay where nobody may look."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Keys and values (X, P, G, E) of one layer of a pool, and the pages (T, X) of sequences.

    Entries behind a sequence's length are NaN, and so is a page that nobody owns; the table names it behind a
    sequence's pages.
    """

    key_XPGE: Tensor
    value_XPGE: Tensor
    table_TX: Tensor


def make_pages(
    lengths: list[int],
    *,
    device: torch.device,
    entries: int = 16,
    groups: int = 2,
    size: int = 16,
    width: int = 0,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
) -> Pages:
    """One sequence for each of `lengths`, its table `width` pages wide or as wide as the longest needs."""
    needed = [-(-length // entries) for length in lengths]
    free = (torch.randperm(sum(needed)) + 1).tolist()
    pool = torch.full((len(free) + 1, 3, 2, entries, groups, size), float("nan"))
    table_TX = torch.zeros(len(lengths), max([width, 1, *needed]), dtype=index_dtype)
    for row, (length, num_pages) in enumerate(zip(lengths, needed, strict=True)):
        for number in range(num_pages):
            page, filled = free.pop(), min(entries, length - number * entries)
            table_TX[row, number] = page
            pool[page, :, :, :filled] = torch.randn(3, 2, filled, groups, size)
    pool = pool.to(dtype).to(device)
    return Pages(key_XPGE=pool[:, 1, 0], value_XPGE=pool[:, 1, 1], table_TX=table_TX.to(device))


def make_overlay(pages: Pages, lengths: list[list[int]]) -> Tensor:
    """What lies over the entries of sequences (R, X, P): sequence s has `lengths[s][0]` entries and stands in row
    `s * len(lengths[0])` of the table; those of its recursion r, `lengths[s][r]`, r rows further. The last of them is
    that of its last token."""
    recursions, entries = len(lengths[0]) - 1, pages.key_XPGE.shape[1]
    entry_RXP = torch.full((recursions, *pages.key_XPGE.shape[:2]), UNREAD, dtype=torch.int32)
    for sequence, (length, *owned) in enumerate(lengths):
        page_X = pages.table_TX[sequence * (recursions + 1)].tolist()
        for above, count in enumerate(owned):
            among = [*torch.randperm(length - 1)[: count - 1].sort().values.tolist(), length - 1]
            for number in range(length):
                own = among.index(number) if number in among else -1
                entry_RXP[above, page_X[number // entries], number % entries] = own
    return entry_RXP.to(pages.table_TX.device)


def overlay_of(entry_RXP: Tensor, recursions: list[int], dtype: torch.dtype) -> Overlay:
    """Of rows at these recursions."""
    return Overlay(torch.tensor(recursions, device=entry_RXP.device, dtype=dtype), entry_RXP)


def place_of(pages: Pages, row: int, entry: int, over: tuple[Tensor, int] | None = None) -> tuple[int, int]:
    """Page of an entry, and place in it; `over`: what lies over the entries, and the row's recursion."""
    entries = pages.key_XPGE.shape[1]
    at = int(pages.table_TX[row, entry // entries]), entry % entries
    if over is not None and over[1]:
        own = int(over[0][over[1] - 1][at])
        if own >= 0:
            return int(pages.table_TX[row + over[1], own // entries]), own % entries
    return at


def attend_alone(query_HE: Tensor, pages: Pages, row: int, last: int, over: tuple[Tensor, int] | None = None) -> Tensor:
    """The heads' outputs (H, E) of one query in double precision, from the definition."""
    groups = pages.key_XPGE.shape[2]
    heads, size = query_HE.shape
    places = [place_of(pages, row, entry, over) for entry in range(last + 1)]
    key_LGE, value_LGE = (torch.stack([of[at] for at in places]) for of in (pages.key_XPGE, pages.value_XPGE))
    out_HE = torch.empty(heads, size, dtype=torch.float64, device=query_HE.device)
    for head in range(heads):
        group = head // (heads // groups)
        score_L = key_LGE[:, group].double() @ query_HE[head].double() * size**-0.5
        out_HE[head] = score_L.softmax(0) @ value_LGE[:, group].double()
    return out_HE
