"""Slots on a CPU, on exactly the rows that matter: the same requests as in `test_slots.py`, the same function."""

from __future__ import annotations

import random
import shutil
from typing import Any

import pytest
import torch

from mor.engine import slot_rows
from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.engine.slot_rows import RowProgram
from tests.engine.test_engine import ALL_MODELS, alike, crowd, options
from tests.engine.test_reliability import POISON, poisoned
from tests.engine.workload import (
    check_against_forward,
    check_all_free,
    engine_of,
    play,
    random_tokens,
    tight_pool,
)
from tests.tiny import KV_CACHES, label, tiny_model

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def rows_of(model: Any, **settings: Any) -> Engine:
    engine = engine_of(model, **{"native": True, "slot_visits": 3, **settings})
    assert engine.slots is not None and isinstance(engine.slots._program, RowProgram)
    return engine


@pytest.mark.parametrize("architecture", ALL_MODELS, ids=[label({k: str(v) for k, v in a.items()}) for a in ALL_MODELS])
def test_greedy_output_is_the_models(architecture: dict[str, Any]) -> None:
    number = ALL_MODELS.index(architecture)
    draw, visits = random.Random(number), 1 + number % 3
    model = tiny_model(**architecture)
    engine = rows_of(model, slot_visits=visits, **options(draw, page_entries=draw.choice([1, 2, 4, 8]), num_pages=900))
    sharing = play(engine, alike(draw))
    assert all(sharing[name].last.cached_tokens == 32 for name in "012")  # type: ignore[union-attr]
    jobs, settings = crowd(draw), options(draw, page_entries=draw.choice([1, 2]))
    engine = rows_of(model, slot_visits=visits, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    crowded = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    check_against_forward(model, [*sharing.values(), *crowded.values()])
    check_all_free(engine)


def test_samples_what_planned_visits_sample() -> None:
    model, draw = tiny_model(router="expert_choice"), random.Random(4)
    several: list[dict[str, Any]] = [
        dict(temperature=0.8),
        dict(temperature=1.3, top_k=5),
        dict(top_p=0.6),
        dict(min_p=0.1, temperature=0.7),
        dict(temperature=0.0),
        dict(repetition_penalty=1.5),
        dict(logprobs=3),
    ]
    prompts = [random_tokens(draw, draw.randrange(1, 9)) for _ in several]
    params = [SamplingParams(**{"seed": n, "max_tokens": 9, "logprobs": 0, **each}) for n, each in enumerate(several)]
    inside, outside = (
        engine.generate(prompts, params, progress=False) for engine in (rows_of(model), engine_of(model))
    )
    for mine, other in zip(inside, outside, strict=True):
        assert (mine.token_ids, mine.depths, mine.text) == (other.token_ids, other.depths, other.text)
        ours, theirs = ([token.logprob for token in output.tokens] for output in (mine, other))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_many_rows_draw_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the C program has a head for."""
    model = tiny_model(router="expert_choice")
    prompts, params = [[1, 2], [3], [4, 5]], [SamplingParams(seed=n, max_tokens=9) for n in range(3)]
    few = rows_of(model).generate(prompts, params, progress=False)
    monkeypatch.setattr(slot_rows, "MOST_ROWS", 1)
    many = rows_of(model).generate(prompts, params, progress=False)
    assert [output.token_ids for output in many] == [output.token_ids for output in few]


def test_a_batch_ends_with_the_first_request_that_ends() -> None:
    """Those that wait need not wait for its other visits."""
    engine = rows_of(tiny_model(), slot_visits=50)
    engine.add_request("short", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add_request("long", [3], SamplingParams(max_tokens=9, ignore_eos=True))
    finished: list[list[str]] = []
    while engine.has_unfinished:
        ended = [output.id for output in engine.step() if output.finished]
        finished += [ended] if ended else []
    assert finished == [["short"], ["long"]]
    assert engine.statistics.visits < 15
    check_all_free(engine)


@pytest.mark.parametrize("settings", [{}, {"causal_method": "aux_router"}, {"router": "threshold_choice"}])
def test_sees_weights_that_change(settings: dict[str, Any]) -> None:
    """In place, as training changes them; those of the router too."""
    model = tiny_model(**{"router": "expert_choice", **settings})
    engine, prompts = rows_of(model, prefix_caching=False), [[1, 2, 3], [4, 5]]
    before = engine.generate(prompts, greedy_params(), progress=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.neg_().add_(0.05)
    after = engine.generate(prompts, greedy_params(), progress=False)
    fresh = engine_of(model).generate(prompts, greedy_params(), progress=False)
    assert [(output.token_ids, output.depths) for output in after] == [(o.token_ids, o.depths) for o in fresh]
    assert [output.depths for output in after] != [output.depths for output in before]


def greedy_params() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_a_row_of_nan_fails_alone(kv_cache: str) -> None:
    engine = rows_of(poisoned(kv_cache))
    outputs = engine.generate([[1, 2, POISON], [3, 4]], greedy_params(), progress=False)
    assert [output.finish_reason for output in outputs] == ["error", "length"]
    check_all_free(engine)
