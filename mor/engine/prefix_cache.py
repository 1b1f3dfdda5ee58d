"""Keys and values of prompts that were computed before, for requests that begin with the same tokens.

A tree: a node adds `granularity` tokens to its parent's. So tokens are compared, not hashes of them, and a node refers
only to the pages in which its own entries lie.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mor.engine.block_pool import BlockPool
from mor.engine.cache_shape import CacheShape
from mor.engine.params import MOST_BUDGETS, Budget
from mor.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class PageCopy:
    """Copy the page `source` over the page `target`, both of virtual sequence `sequence`, before the next visit."""

    source: int
    target: int
    sequence: int


@dataclass(kw_only=True, eq=False)
class PrefixNode:
    """A prefix of `num_tokens` tokens, which has `lengths` entries in each sequence.

    `depths`: of its own tokens, those beyond its parent's. `pages`: per sequence, the page of its first own entry and
    all after it; that page is number `first` of the sequence and may begin with entries of the parent.
    """

    parent: PrefixNode | None
    tokens: tuple[int, ...]
    num_tokens: int
    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict[tuple[int, ...], "PrefixNode"])
    num_users: int = 0
    last_use: int = 0
    is_queued: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it can be dropped: nobody runs on it and no longer prefix builds on it."""
        return self.parent is not None and not self.num_users and not self.children

    def path(self) -> list[PrefixNode]:
        """The nodes from the shortest prefix to this one."""
        nodes: list[PrefixNode] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """Prefixes of whole multiples of `granularity` tokens, per budget (which decides the tokens' depths).

    A request *holds* the nodes whose pages it uses: evicting these would free nothing, so they stay. The last page of
    a sequence may be partly filled; whoever adopts the prefix writes into a copy of it.
    """

    def __init__(self, pool: BlockPool, shape: CacheShape, *, granularity: int = 32) -> None:
        if granularity < 1:
            raise ValueError(f"granularity={granularity} must be at least 1")
        self.granularity = granularity
        self._pool, self._shape = pool, shape
        self._roots: dict[Budget, PrefixNode] = {}
        self._held: dict[str, list[PrefixNode]] = {}
        self._idle: list[tuple[int, int, PrefixNode]] = []
        self._clock = 0

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes, parents first."""
        ahead = list(self._roots.values())
        while ahead:
            node = ahead.pop()
            ahead += node.children.values()
            if node.parent is not None:
                yield node

    def lookup(self, tokens: Sequence[int], budget: Budget) -> PrefixNode | None:
        """The longest known prefix that leaves at least one of `tokens` to compute."""
        root = self._roots.get(budget)
        if root is None:
            return None
        node = root
        for start in range(0, len(tokens) - self.granularity, self.granularity):
            child = node.children.get(tuple(tokens[start : start + self.granularity]))
            if child is None:
                break
            node = child
        return None if node is root else node

    def hold(self, request: Request, node: PrefixNode) -> None:
        """Keep a prefix from being evicted until `request` releases it."""
        self._hold(request, node.path())

    def _hold(self, request: Request, nodes: Sequence[PrefixNode]) -> None:
        self._clock += 1
        for node in nodes:
            node.num_users += 1
            node.last_use = self._clock
        self._held.setdefault(request.id, []).extend(nodes)

    def release(self, request: Request) -> None:
        """End what a request holds."""
        self._clock += 1
        for node in self._held.pop(request.id, ()):
            node.num_users -= 1
            node.last_use = self._clock
            self._queue(node)

    def adopt(self, request: Request, node: PrefixNode) -> list[PageCopy]:
        """Let `request`, which holds `node` and has nothing yet, go on from that prefix.

        Whole pages are shared; for a partly filled one a fresh page is taken, and the copy to make is returned. Raises
        OutOfPages, and changes nothing, when there is none.
        """
        assert not request.num_computed and not request.num_pages
        path = node.path()
        pages = self._pages(path)
        tails = [s for s, length in enumerate(node.lengths) if length % self._shape.tokens_per_page[s]]
        targets = self._pool.take(len(tails))
        copies = [
            PageCopy(source=pages[s].pop(), target=target, sequence=s) for s, target in zip(tails, targets, strict=True)
        ]
        for page in (page for whole in pages for page in whole):
            self._pool.share(page)
        for copy in copies:
            pages[copy.sequence].append(copy.target)
        request.pages, request.lengths = pages, list(node.lengths)
        request.depths = [depth for part in path for depth in part.depths]
        request.num_computed = node.num_tokens
        return copies

    def _pages(self, path: Sequence[PrefixNode]) -> list[list[int]]:
        """Pages of the last node's prefix. Where two nodes have the same page number, the later one's holds more."""
        pages: list[list[int]] = [[] for _ in range(self._shape.num_sequences)]
        for node in path:
            for mine, first, own in zip(pages, node.first, node.pages, strict=True):
                mine[first:] = own
        return pages

    def insert(self, request: Request) -> None:
        """Remember what a request has computed, for others; it keeps writing behind its last node's entries."""
        node = self._root(request.params.budget)
        tokens, new = request.tokens[: request.num_computed], list[PrefixNode]()
        for start in range(0, len(tokens) - self.granularity + 1, self.granularity):
            key = tuple(tokens[start : start + self.granularity])
            depths = tuple(request.depths[start : start + self.granularity])
            child = node.children.get(key)
            if child is None:
                child = self._grow(node, key, depths, request.pages)
                new.append(child)
            elif child.depths != depths:
                break  # rounding decided otherwise there: what follows would not fit
            node = child
        self._hold(request, new)

    def _root(self, budget: Budget) -> PrefixNode:
        if budget not in self._roots:
            if len(self._roots) >= MOST_BUDGETS:
                self._roots = {other: root for other, root in self._roots.items() if root.children}
            none = (0,) * self._shape.num_sequences
            self._roots[budget] = PrefixNode(
                parent=None, tokens=(), num_tokens=0, depths=(), lengths=none, first=none, pages=((),) * len(none)
            )
        return self._roots[budget]

    def _grow(
        self, parent: PrefixNode, tokens: tuple[int, ...], depths: tuple[int, ...], pages: Sequence[Sequence[int]]
    ) -> PrefixNode:
        """A child whose entries lie in a request's `pages`."""
        lengths, first, own = list[int](), list[int](), list[tuple[int, ...]]()
        each = zip(parent.lengths, self._shape.lengths(depths), self._shape.tokens_per_page, pages, strict=True)
        for have, added, size, table in each:
            stop = -(-(have + added) // size)
            start = have // size if added else stop
            lengths.append(have + added)
            first.append(start)
            own.append(tuple(table[start:stop]))
            for page in own[-1]:
                self._pool.share(page)
        child = PrefixNode(
            parent=parent,
            tokens=tokens,
            num_tokens=parent.num_tokens + len(tokens),
            depths=depths,
            lengths=tuple(lengths),
            first=tuple(first),
            pages=tuple(own),
        )
        parent.children[tokens] = child
        return child

    def evict(self, num_pages: int) -> None:
        """Drop idle prefixes, least recently used first, until `num_pages` more pages are free or none is idle."""
        goal = self._pool.num_free + num_pages
        while self._idle and self._pool.num_free < goal:
            last_use, _, node = heapq.heappop(self._idle)
            node.is_queued = False
            if node.is_idle and node.last_use == last_use:
                self._drop(node)
            else:
                self._queue(node)

    def clear(self) -> None:
        """Forget everything, prefixes that are held included: their holders have references to the pages of their
        own."""
        for node in self.nodes():
            self._release_pages(node)
        self._roots, self._held, self._idle = {}, {}, []

    def _queue(self, node: PrefixNode) -> None:
        if node.is_idle and not node.is_queued:
            node.is_queued = True
            self._clock += 1
            heapq.heappush(self._idle, (node.last_use, self._clock, node))

    def _drop(self, node: PrefixNode) -> None:
        assert node.parent is not None
        self._release_pages(node)
        del node.parent.children[node.tokens]
        self._queue(node.parent)

    def _release_pages(self, node: PrefixNode) -> None:
        for pages in node.pages:
            self._pool.release(pages)
