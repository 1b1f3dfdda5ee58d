"""Pages of random keys and values with sequences laid over them in random order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def attend_alone(query_HE: Tensor, pages: Pages, row: int, last: int) -> Tensor:
    """The heads' outputs (H, E) of one query in double precision, from the definition."""
    entries, groups = pages.key_XPGE.shape[1:3]
    heads, size = query_HE.shape
    key_LGE = torch.stack([pages.key_XPGE[pages.table_TX[row, n // entries], n % entries] for n in range(last + 1)])
    value_LGE = torch.stack([pages.value_XPGE[pages.table_TX[row, n // entries], n % entries] for n in range(last + 1)])
    out_HE = torch.empty(heads, size, dtype=torch.float64, device=query_HE.device)
    for head in range(heads):
        group = head // (heads // groups)
        score_L = key_LGE[:, group].double() @ query_HE[head].double() * size**-0.5
        out_HE[head] = score_L.softmax(0) @ value_LGE[:, group].double()
    return out_HE
