"""Known prefixes are found, shared, copied before they are written to, and given up when pages lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mor.engine.block_pool import BlockPool, OutOfPages
from mor.engine.cache_shape import CacheShape
from mor.engine.limits import Limits
from mor.engine.prefix_cache import PrefixCache
from mor.engine.request import Request
from tests.engine.scenarios import Scenario, scenarios, shapes
from tests.engine.simulation import SimulatedModel, Simulation, request, small_shape

SHAPE = small_shape(2)
MODEL = SimulatedModel(shape=SHAPE)
LIMITS = Limits(max_requests=4, max_visit_tokens=64, prefill_chunk=16, max_length=64)
TOKENS = [1, 2, 3, 4, 5, 6, 1, 3, 5, 2, 4, 6, 6, 5]


def computed(name: str, tokens: Sequence[int], pool: BlockPool, model: SimulatedModel = MODEL) -> Request:
    """A request that has computed all its tokens and holds pages for them."""
    found = request(name, tokens)
    found.depths = model.depths(tokens, found.params.budget)
    found.num_computed, found.lengths = len(tokens), model.shape.lengths(found.depths)
    found.pages = [pool.take(model.shape.pages(s, length)) for s, length in enumerate(found.lengths)]
    return found


def release(found: Request, cache: PrefixCache, pool: BlockPool) -> None:
    cache.release(found)
    for page in (page for pages in found.pages for page in pages):
        pool.release([page])
    found.pages, found.lengths = [[] for _ in found.pages], [0 for _ in found.lengths]


@settings(max_examples=150, deadline=None)
@given(shapes(), st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(1, 9), st.data())
def test_a_hit_has_the_lengths_and_pages_of_computing_it(
    shape: CacheShape, tokens: list[int], granularity: int, data: st.DataObject
) -> None:
    model, pool = SimulatedModel(shape=shape), BlockPool(300)
    cache = PrefixCache(pool, shape, granularity=granularity)
    first = computed("a", tokens, pool, model)
    cache.insert(first)
    same = data.draw(st.integers(1, len(tokens)))
    second = request("b", [*tokens[:same], *data.draw(st.lists(st.integers(0, 6), max_size=5))])
    node = cache.lookup(second.prompt, second.params.budget)
    common = next(
        (i for i, (a, b) in enumerate(zip(tokens, second.prompt)) if a != b), min(len(tokens), len(second.prompt))
    )
    expected = min(common, len(second.prompt) - 1) // granularity * granularity
    assert (node.num_tokens if node else 0) == expected
    if node is None:
        return
    cache.hold(second, node)
    copies = cache.adopt(second, node)
    depths = model.depths(tokens[:expected], second.params.budget)
    assert (second.num_computed, second.depths, second.lengths) == (expected, depths, shape.lengths(depths))
    copied = {(copy.sequence, copy.target): copy.source for copy in copies}
    for sequence, (length, pages) in enumerate(zip(second.lengths, second.pages, strict=True)):
        originals = [copied.get((sequence, page), page) for page in pages]
        assert originals == first.pages[sequence][: shape.pages(sequence, length)]
        is_partial = length % shape.tokens_per_page[sequence] > 0
        assert [page for page in pages if (sequence, page) in copied] == (pages[-1:] if is_partial else [])
        assert all(pool.references(page) == 1 for page in pages[length // shape.tokens_per_page[sequence] :])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(), st.integers(1, 6))
def test_outputs_do_not_depend_on_the_cache(scenario: Scenario, granularity: int) -> None:
    def outputs(size: int | None) -> dict[str, list[int]]:
        fields = {name: getattr(scenario, name) for name in ("model", "limits", "spare_pages")}
        changes: dict[str, Any] = dict(max_recursions=None, ignore_eos=True, abort_at=None)
        arrivals = tuple(replace(arrival, **changes) for arrival in scenario.arrivals)
        _, requests = Scenario(**fields, arrivals=arrivals, granularity=size).play()
        return {found.id: found.output for found in requests}

    assert outputs(granularity) == outputs(None)


def test_one_token_is_left_to_compute() -> None:
    pool = BlockPool(50)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    cache.insert(computed("a", TOKENS[:8], pool))
    budget = request("b", [1]).params.budget
    sizes = [(node.num_tokens if (node := cache.lookup(TOKENS[:size], budget)) else 0) for size in (4, 5, 8, 9, 14)]
    assert sizes == [0, 4, 4, 8, 8]


def test_requests_of_another_budget_have_prefixes_of_their_own() -> None:
    pool = BlockPool(50)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    cache.insert(computed("a", TOKENS, pool))
    assert cache.lookup(TOKENS, (None, None)) and cache.lookup(TOKENS, (1.5, None)) is None
    assert cache.lookup(TOKENS, (None, 1)) is None


def test_the_least_recently_used_prefix_goes_first_and_held_ones_stay() -> None:
    pool = BlockPool(60)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    for name in "abc":
        found = computed(name, [ord(name), 1, 2, 3, 4, 5, 6], pool)
        cache.insert(found)
        release(found, cache, pool)
    users = {name: request(name.upper(), [ord(name), 1, 2, 3, 9]) for name in "ab"}
    for user in users.values():
        node = cache.lookup(user.prompt, user.params.budget)
        assert node is not None
        cache.hold(user, node)
    cache.release(users["a"])

    def known() -> set[str]:
        return {chr(node.tokens[0]) for node in cache.nodes()}

    cache.evict(1)
    assert known() == {"a", "b"}
    cache.evict(pool.num_pages)
    assert known() == {"b"}
    cache.release(users["b"])
    cache.evict(1)
    assert known() == set() and pool.num_free == pool.num_pages


def test_a_longer_prefix_goes_before_the_shorter_one_it_builds_on() -> None:
    pool = BlockPool(60)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    found = computed("a", TOKENS[:12], pool)
    cache.insert(found)
    release(found, cache, pool)
    sizes: list[list[int]] = []
    while list(cache.nodes()):
        cache.evict(1)
        sizes.append(sorted(node.num_tokens for node in cache.nodes()))
    assert sizes[-1] == [] and all(size == [4, 8, 12][: len(size)] for size in sizes)
    assert pool.num_free == pool.num_pages


def test_a_prefix_whose_depths_differ_is_not_built_upon() -> None:
    pool = BlockPool(60)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    cache.insert(computed("a", TOKENS[:4], pool))
    other = computed("b", TOKENS[:12], pool)
    other.depths = [(depth + 1) % 3 for depth in other.depths]
    cache.insert(other)
    assert [node.num_tokens for node in cache.nodes()] == [4]


def test_adopting_without_a_free_page_changes_nothing() -> None:
    pool = BlockPool(50)
    cache = PrefixCache(pool, SHAPE, granularity=3)
    cache.insert(computed("a", TOKENS[:3], pool))
    rest = pool.take(pool.num_free)
    late = request("b", TOKENS)
    node = cache.lookup(late.prompt, late.params.budget)
    assert node is not None
    before = [pool.references(page) for page in range(50)]
    with pytest.raises(OutOfPages):
        cache.adopt(late, node)
    assert before == [pool.references(page) for page in range(50)] and not late.pages and rest


def test_clearing_leaves_requests_their_pages() -> None:
    pool = BlockPool(60)
    cache = PrefixCache(pool, SHAPE, granularity=4)
    found = computed("a", TOKENS, pool)
    cache.insert(found)
    cache.clear()
    assert not list(cache.nodes()) and pool.num_free == pool.num_pages - found.num_pages
    release(found, cache, pool)
    assert pool.num_free == pool.num_pages


def test_a_common_beginning_is_computed_once() -> None:
    played = Simulation(model=MODEL, limits=LIMITS, num_pages=200, granularity=4)
    requests = [request(name, [*TOKENS, i], max_tokens=6, ignore_eos=True) for i, name in enumerate("abc")]
    for found in requests:
        played.add(found)
        played.step()
        played.step()
    played.run()
    assert [found.cached_tokens for found in requests] == [0, 12, 12]
    entered = {(name, start): count for visit in played.visits for name, start, count, _ in visit}
    assert entered["b", 12] == len(TOKENS) + 1 - 12 and ("b", 0) not in entered


def test_a_prefix_in_use_survives_a_blocked_queue() -> None:
    limits = Limits(max_requests=4, max_visit_tokens=64, prefill_chunk=16, max_length=48)
    played = Simulation(model=MODEL, limits=limits, num_pages=24, granularity=4)
    played.add(request("a", TOKENS, max_tokens=10, ignore_eos=True))
    played.add(request("wide", [6] * 30, max_tokens=2))
    for _ in range(6):
        played.step()
    assert played.scheduler.num_waiting == 1 and played.cache is not None
    assert max(node.num_tokens for node in played.cache.nodes()) == 12
    played.run()


def test_granularity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="granularity=0 must be at least 1"):
        PrefixCache(BlockPool(1), SHAPE, granularity=0)
