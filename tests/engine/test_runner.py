"""A visit applies the block once, to the tokens that take it and to no others."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from mor.engine.engine import Engine
from mor.engine.request import Segment, SegmentResult
from tests.engine.workload import engine_of, greedy, random_tokens
from tests.tiny import KV_CACHES, tiny_model


class Watched:
    """An engine whose runner is driven by hand, and the rows that each layer was applied to, visit by visit."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.rows = engine, list[Counter[str]]()
        names = {id(layer): "block" for layer in engine.model.model.recursion.block}
        apply = engine.runner._layers

        class Watching:
            normed, logits, ops = apply.normed, apply.logits, apply.ops

            def __call__(self, layers: Any, x_MD: torch.Tensor, *rest: Any) -> torch.Tensor:
                for layer in layers:
                    name = names.get(id(layer), "outer")
                    counts[-1][name] += len(x_MD)
                    counts[-1][f"{name} calls"] += 1
                return apply(layers, x_MD, *rest)

        counts = self.rows
        monkeypatch.setattr(engine.runner, "_layers", Watching())

    def visit(self, segments: list[Segment] | None = None) -> dict[str, tuple[Segment, SegmentResult]]:
        """One visit of the planned segments, or of these among them."""
        planned = self.engine.scheduler.plan().segments
        segments = planned if segments is None else segments
        self.rows.append(Counter())
        results = self.engine.runner.visit(segments)
        return {s.request.id: (s, result) for s, result in zip(segments, results, strict=True)}

    def complete(self, results: dict[str, tuple[Segment, SegmentResult]]) -> None:
        for segment, result in results.values():
            self.engine.scheduler.complete(segment, result)


def prompt(size: int, seed: int = 0) -> tuple[int, ...]:
    return random_tokens(random.Random(seed), size)


def full_depths(engine: Engine, tokens: tuple[int, ...]) -> list[int]:
    with torch.no_grad():
        return engine.model(torch.tensor([tokens])).depths[0].tolist()


def test_one_visit_serves_all_recursions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come one visit after another stand at different recursions and share every visit."""
    watched = Watched(engine_of(tiny_model(router="gate")), monkeypatch)
    for number in range(3):
        watched.engine.add_request(f"{number}", prompt(number + 1), greedy(1))
        results = watched.visit()
        assert len(results) == number + 1
        watched.complete(results)
    assert [segment.recursion for segment, _ in results.values()] == [3, 2, 1]
    size = watched.engine.model.config.depth_plan.block_size
    assert [rows["block calls"] for rows in watched.rows] == [size] * 3
    assert [rows["block"] for rows in watched.rows] == [size * count for count in (1, 1 + 2, 1 + 2 + 3)]


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "token_choice", "none"])
def test_the_block_sees_only_tokens_that_take_it(monkeypatch: pytest.MonkeyPatch, router: str, kv_cache: str) -> None:
    model = tiny_model(router=router, kv_cache=kv_cache, sharing="middle_cycle")
    watched = Watched(engine_of(model, prefix_caching=False), monkeypatch)
    tokens = prompt(30)
    watched.engine.add_request("0", tokens, greedy(1))
    depths, segment, result = full_depths(watched.engine, tokens), None, None
    for recursion in range(max(depths)):
        results = watched.visit()
        [(segment, result)] = results.values()
        taking = sum(depth > recursion for depth in depths)
        assert watched.rows[-1]["block"] == taking * model.config.depth_plan.block_size
        assert result.active == sum(depth > recursion + 1 for depth in depths)
        assert bool(result.depths) == (result.active == 0)
        own = kv_cache != "shared" or recursion == 0
        assert result.added[recursion] == taking * own and sum(result.added[:3]) == taking * own
        watched.complete(results)
    assert segment is not None and result is not None
    assert list(result.depths) == depths and segment.request.depths == depths
    assert segment.request.lengths == watched.engine.runner.layout.shape.lengths(depths)
    assert sum(rows["outer"] for rows in watched.rows) == 2 * len(tokens)


def test_tokens_that_take_no_recursion_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With capacities below one a token may have depth 0: no entries, and logits in the visit in which it came."""
    model = tiny_model(router="expert_choice", capacities=[0.4, 0.3, 0.2])
    watched = Watched(engine_of(model), monkeypatch)
    for seed in range(20):
        watched.engine.add_request(f"{seed}", prompt(1, seed), greedy(1))
    depths = {f"{seed}": full_depths(watched.engine, prompt(1, seed)) for seed in range(20)}
    results = watched.visit()
    done = {name: list(result.depths) for name, (_, result) in results.items() if not result.active}
    assert 0 < len(done) < 20
    assert all(depths[name] == told for name, told in done.items())
    assert sum(depths[name] == [0] for name in depths) == sum(told == [0] for told in done.values()) > 0
    taking = sum(told != [0] for told in depths.values())
    assert watched.rows[-1]["block"] == taking * model.config.depth_plan.block_size


def test_logits_come_with_the_last_known_token_and_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_model(), prefill_chunk=4)
    watched, tokens = Watched(engine, monkeypatch), prompt(10)
    engine.add_request("0", tokens, greedy(1))
    heard = []
    for _ in range(3):
        results = watched.visit()
        [(segment, _)] = results.values()
        heard.append(engine.runner.take_logits(segment))
        assert engine.runner.take_logits(segment) is None
        watched.complete(results)
    assert heard[:2] == [None, None] and heard[2] is not None
    with torch.no_grad():
        expected = engine.model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(heard[2], expected, atol=1e-5, rtol=0)


def test_segments_that_are_not_listed_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that entered together one is dropped: it costs nothing more and changes nothing."""
    engine = engine_of(tiny_model(router="gate"))
    watched, names = Watched(engine, monkeypatch), ("kept", "dropped")
    for name in names:
        engine.add_request(name, prompt(5, len(name)), greedy(1))
    watched.complete(watched.visit())
    engine.scheduler.abort("dropped")
    for _ in range(2):
        results = watched.visit()
        assert set(results) == {"kept"}
        watched.complete(results)
    size = engine.model.config.depth_plan.block_size
    assert [rows["block"] for rows in watched.rows] == [10 * size, 5 * size, 5 * size]
    segment = results["kept"][0]
    logits = engine.runner.take_logits(segment)
    assert logits is not None
    with torch.no_grad():
        expected = engine.model(torch.tensor([prompt(5, 4)])).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    engine.runner.visit([])
    assert engine.runner._cohorts == []


def test_forgetting_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_model(router="gate"))
    watched = Watched(engine, monkeypatch)
    engine.add_request("0", prompt(3), greedy(1))
    results = watched.visit()
    engine.runner.forget()
    assert engine.runner._cohorts == [] and engine.runner._logits == {}
    again = watched.visit()  # it was not completed: it enters anew
    assert [result for _, result in again.values()] == [result for _, result in results.values()]


def test_layers_that_repeat_in_place_take_all_recursions_in_one_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(router="none", sharing="middle_sequence")
    watched = Watched(engine_of(model), monkeypatch)
    watched.engine.add_request("0", prompt(4), greedy(1))
    [(_, result)] = watched.visit().values()
    assert result == SegmentResult(added=(4, 4, 4, 4), active=0, depths=(3,) * 4)
    assert watched.rows[-1]["block calls"] == len(model.config.depth_plan.block_steps)
