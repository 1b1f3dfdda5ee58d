"""No page is lost, doubled, or freed while somebody holds it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mor.engine.block_pool import BlockPool, OutOfPages

NUM_PAGES = 8


class PoolMachine(RuleBasedStateMachine):
    """Random takes, shares and releases beside a plain count of references."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.held = BlockPool(NUM_PAGES), Counter[int]()

    @rule(count=st.integers(0, NUM_PAGES + 2))
    def take(self, count: int) -> None:
        free = NUM_PAGES - len(self.held)
        if count > free:
            with pytest.raises(OutOfPages, match=f"{count} pages asked for, {free} of {NUM_PAGES} are free"):
                self.pool.take(count)
            return
        pages = self.pool.take(count)
        assert len(set(pages)) == count and not set(pages) & set(self.held)
        self.held.update(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.share(page)
        self.held[page] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release([page])
        self.held -= Counter([page])

    @invariant()
    def counts_agree(self) -> None:
        assert [self.pool.references(page) for page in range(NUM_PAGES)] == [self.held[p] for p in range(NUM_PAGES)]
        assert self.pool.num_free == NUM_PAGES - len(self.held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_free_page_can_be_neither_shared_nor_released() -> None:
    pool = BlockPool(2)
    (page,) = pool.take(1)
    pool.release([page])
    with pytest.raises(AssertionError, match="is free already"):
        pool.release([page])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share(page)


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1"):
        BlockPool(0)
