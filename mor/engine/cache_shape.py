"""The arithmetic of virtual sequences: how many entries and pages tokens of given depths need."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """The virtual sequences of a model: one per recursion, then one for the unshared layers if it has any.

    Per sequence: `tokens_per_page` entries fit a page; `holds_all` tells that every token has an entry (the unshared
    layers'; the first recursion's when later ones read it), whatever its depth; `written` is False for a sequence that
    keeps nothing (later recursions under shared keys and values). `one_visit`: a visit takes all recursions at once,
    as layers that repeat in place (AA BB) must.
    """

    num_recursions: int
    tokens_per_page: tuple[int, ...]
    holds_all: tuple[bool, ...]
    written: tuple[bool, ...]
    one_visit: bool = False

    def __post_init__(self) -> None:
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions={self.num_recursions} must be at least 1")
        sizes = {len(self.tokens_per_page), len(self.holds_all), len(self.written)}
        if len(sizes) != 1 or self.num_sequences not in (self.num_recursions, self.num_recursions + 1):
            raise ValueError(
                f"tokens_per_page={self.tokens_per_page}, holds_all={self.holds_all} and written={self.written} must "
                f"each have num_recursions={self.num_recursions} values, and one more with unshared layers"
            )
        if min(self.tokens_per_page) < 1:
            raise ValueError(f"tokens_per_page={self.tokens_per_page} must be at least 1 each")
        if not all(self.holds_all[self.num_recursions :]):
            raise ValueError(f"holds_all={self.holds_all} must be True for the unshared layers")

    @property
    def num_sequences(self) -> int:
        return len(self.tokens_per_page)

    @cached_property
    def growing(self) -> tuple[tuple[int, ...], ...]:
        """For each recursion, the sequences that may get entries in a visit at it. Entering is at recursion 0."""
        outer = range(self.num_recursions, self.num_sequences)
        visited = [(0, *outer), *((r,) for r in range(1, self.num_recursions))]
        if self.one_visit:
            visited = [tuple(range(self.num_sequences))]
        return tuple(tuple(s for s in sequences if self.written[s]) for sequences in visited)

    def pages(self, sequence: int, length: int) -> int:
        """Pages that `length` entries of a sequence fill."""
        return -(-length // self.tokens_per_page[sequence])

    def lengths(self, depths: Sequence[int]) -> list[int]:
        """Entries in each sequence of tokens of these depths: recursion r has one per depth above r."""
        above, lengths = len(depths), list[int]()
        for sequence, (written, holds_all) in enumerate(zip(self.written, self.holds_all, strict=True)):
            above -= depths.count(sequence)
            lengths.append(0 if not written else len(depths) if holds_all else above)
        return lengths

    def growths(self, visits: int) -> tuple[int, ...]:
        """The most entries that each sequence of a request can get in so many visits of a slot: a token brings one to a
        recursion, after a visit of each recursion before it."""
        return tuple(
            0
            if not written
            else visits
            if self.one_visit or sequence >= self.num_recursions
            else -(-visits // (sequence + 1))
            for sequence, written in enumerate(self.written)
        )

    def worst_pages(self, num_tokens: int, lengths: Sequence[int] | None = None, num_computed: int = 0) -> int:
        """Pages that `num_tokens` tokens need when those after the first `num_computed`, which left `lengths`, take
        every recursion."""
        left = num_tokens - num_computed
        return sum(
            self.pages(sequence, min(num_tokens, left + (lengths[sequence] if lengths else 0)))
            for sequence, written in enumerate(self.written)
            if written
        )

    def most_tokens(self, num_pages: int) -> int:
        """The most tokens that fit `num_pages` pages even when all of them take every recursion."""
        return bisect_right(range(num_pages * max(self.tokens_per_page) + 1), num_pages, key=self.worst_pages) - 1
