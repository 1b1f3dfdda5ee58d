"""Attention over pages equals attention over the entries written out, one row and one head at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mor.engine.paged_attention import PagedScope, Span

PAGES, ENTRIES, KV_HEADS, HEADS, SIZE = 40, 3, 2, 6, 4


@dataclass
class Pool:
    """Pages of one layer: the last one blank, NaN in those that nobody has written to, 0 behind what was written."""

    draw: random.Random
    keys: Tensor = field(default_factory=lambda: torch.full((PAGES, ENTRIES, KV_HEADS, SIZE), torch.nan))
    values: Tensor = field(default_factory=lambda: torch.full((PAGES, ENTRIES, KV_HEADS, SIZE), torch.nan))
    overlay: Tensor = field(default_factory=lambda: torch.randint(0, 999, (2, PAGES, ENTRIES), dtype=torch.int32))

    def __post_init__(self) -> None:
        self.free = self.draw.sample(range(PAGES - 1), PAGES - 1)
        self.keys[-1] = self.values[-1] = 0

    def sequence(self, numbers: list[int], spare: int = 0) -> list[int]:
        """Pages of a new sequence of these tokens, and `spare` more in which nothing was written."""
        pages = [self.free.pop() for _ in range(-(-len(numbers) // ENTRIES) + spare)]
        for entry in range(len(numbers)):
            at = pages[entry // ENTRIES], entry % ENTRIES
            if at[1] == 0:
                self.keys[at[0]] = self.values[at[0]] = 0
            self.keys[at], self.values[at] = torch.randn(2, KV_HEADS, SIZE)
        return pages

    def overlaid(self, pages: list[int], numbers: list[int], recursion: int) -> list[int]:
        """Pages of a sequence whose entries lie over those of tokens `numbers` of the one that has `pages`."""
        for number in range(len(pages) * ENTRIES):
            own = numbers.index(number) if number in numbers else -1
            self.overlay[recursion - 1, pages[number // ENTRIES], number % ENTRIES] = own
        return self.sequence(numbers, spare=1)

    def entry(self, pages: list[int], entry: int) -> tuple[Tensor, Tensor]:
        at = pages[entry // ENTRIES], entry % ENTRIES
        return self.keys[at], self.values[at]


def slow_attention(query_HE: Tensor, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One row."""
    heads = []
    for head, query_E in enumerate(query_HE):
        group = head // (HEADS // KV_HEADS)
        scores = torch.stack([query_E @ key[group] for key, _ in entries]) / SIZE**0.5
        heads.append(sum(w * value[group] for w, (_, value) in zip(scores.softmax(0), entries, strict=True)))
    return torch.stack(heads)  # type: ignore[arg-type]


def expected(pool: Pool, spans: list[Span], query_MHE: Tensor) -> Tensor:
    rows: dict[int, Tensor] = {}
    for span in spans:
        for row, last in zip(range(span.start, span.stop), span.last, strict=True):
            entries = [pool.entry(list(span.pages), entry) for entry in range(last + 1)]
            for number in range(last + 1 if span.recursion else 0):
                own = int(pool.overlay[span.recursion - 1, span.pages[number // ENTRIES], number % ENTRIES])
                if own >= 0:
                    entries[number] = pool.entry(list(span.own_pages), own)
            rows[row] = slow_attention(query_MHE[row], entries)
    return torch.stack([rows[row] for row in sorted(rows)])


def random_spans(pool: Pool, *, hybrid: bool) -> list[Span]:
    """Decoding rows and chunks of several lengths; under hybrid caching some have entries of their own."""
    spans, start, draw = list[Span](), 0, pool.draw
    for count in (1, 3, 1, 1, 4, 1):
        length = draw.randrange(count, 11)
        pages = pool.sequence(list(range(length)), spare=draw.randrange(2))
        # Rows of a chunk need not be neighbours: those between them take no part in this recursion.
        last = sorted(draw.sample(range(length), count))
        recursion = draw.randrange(3) if hybrid else 0
        own = sorted({*draw.sample(range(length), length // 2), *last}) if recursion else []
        spans.append(
            Span(
                start=start,
                stop=start + count,
                pages=pages,
                last=last,
                recursion=recursion,
                own_pages=pool.overlaid(pages, own, recursion) if recursion else [],
            )
        )
        start += count
    return spans


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_attention_equals_the_slow_one(seed: int, hybrid: bool) -> None:
    """Pages that a request holds and has not written to are not read: they may hold another's NaN."""
    torch.manual_seed(seed)
    pool = Pool(random.Random(seed))
    spans = random_spans(pool, hybrid=hybrid)
    query_MHE = torch.randn(spans[-1].stop, HEADS, SIZE)
    scope = PagedScope(spans, ENTRIES, pool.overlay)
    keys, values = pool.keys.clone(), pool.values.clone()
    out_MHE = scope.attend(query_MHE, (pool.keys, pool.values))
    torch.testing.assert_close(out_MHE, expected(pool, spans, query_MHE), atol=1e-5, rtol=0)
    torch.testing.assert_close(pool.keys, keys, equal_nan=True, atol=0, rtol=0)
    torch.testing.assert_close(pool.values, values, equal_nan=True, atol=0, rtol=0)


def test_the_order_of_spans_is_that_of_rows() -> None:
    """Chunks and single rows are computed apart and put back in their places."""
    pool = Pool(random.Random(0))
    first, second = pool.sequence([0, 1]), pool.sequence([0])
    spans = [Span(start=0, stop=2, pages=first, last=[0, 1]), Span(start=2, stop=3, pages=second, last=[0])]
    query_MHE = torch.randn(3, HEADS, SIZE)
    out_MHE = PagedScope(spans, ENTRIES, pool.overlay).attend(query_MHE, (pool.keys, pool.values))
    for row, pages in ((0, first), (2, second)):  # a row that sees one entry gets its value
        value_GE = pool.entry(pages, 0)[1]
        torch.testing.assert_close(out_MHE[row], value_GE.repeat_interleave(HEADS // KV_HEADS, 0))


def test_half_precision_pages_serve_float32_queries() -> None:
    pool = Pool(random.Random(0))
    spans = [Span(start=0, stop=1, pages=pool.sequence([0, 1, 2]), last=[2])]
    query_MHE = torch.randn(1, HEADS, SIZE)
    layer = pool.keys.bfloat16(), pool.values.bfloat16()
    out_MHE = PagedScope(spans, ENTRIES, pool.overlay).attend(query_MHE, layer)
    assert out_MHE.dtype == torch.float32
    torch.testing.assert_close(out_MHE, expected(pool, spans, query_MHE), atol=0.05, rtol=0)
