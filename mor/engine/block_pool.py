"""The one pool from which all virtual sequences of all requests take their pages."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class BlockPool:
    """Page ids 0..num_pages-1, each free or referenced a number of times.

    A page that was just released is the next one to be taken, so the pages in use stay few.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        """How many hold a page; 0 when it is free."""
        return self._references[page]

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one reference. Raises OutOfPages, and takes none, when there are fewer."""
        assert count >= 0
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - count :]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a reference to a page in use."""
        assert self._references[page] > 0, f"page {page} is free and cannot be shared"
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page, in this order; the last one frees it."""
        references, free = self._references, self._free
        for page in pages:
            left = references[page] - 1
            assert left >= 0, f"page {page} is free already"
            references[page] = left
            if not left:
                free.append(page)
