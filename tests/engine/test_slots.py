"""Requests that decode by themselves in slots: their tokens, depths and log-probabilities are those of the model alone,
whatever else is in the slots and however the visits fall into batches."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from mor.engine.engine import Engine
from mor.engine.params import SamplingParams
from mor.engine.slot_program import VisitShape
from mor.engine.slot_runner import SIZES
from mor.engine.slot_state import NUM_STOPS, Int
from mor.engine.slots import fits_slot
from mor.engine.visit_choice import serves
from tests.engine.test_engine import ALL_MODELS, alike, calibrated, check_under, crowd, limit_recursions, options
from tests.engine.test_reliability import crowd as large_crowd
from tests.engine.test_reliability import poisoned, very_small
from tests.engine.workload import (
    Job,
    check_against_forward,
    check_all_free,
    drain,
    engine_of,
    greedy,
    play,
    random_tokens,
    tight_pool,
)
from tests.tiny import BUDGET_ROUTERS, KV_CACHES, label, tiny_model


def slots_of(model: Any, **settings: Any) -> Engine:
    engine = engine_of(model, **{"slots": True, "slot_visits": 3, **settings})
    assert engine.slots is not None
    return engine


# the same function


@pytest.mark.parametrize("architecture", ALL_MODELS, ids=[label({k: str(v) for k, v in a.items()}) for a in ALL_MODELS])
def test_greedy_output_is_the_models(architecture: dict[str, Any]) -> None:
    """Arrivals, aborts, prefixes from other requests, preemptions; batches of one visit and of several."""
    number = ALL_MODELS.index(architecture)
    draw, visits = random.Random(number), 1 + number % 3
    model = tiny_model(**architecture)
    engine = slots_of(model, slot_visits=visits, **options(draw, page_entries=draw.choice([1, 2, 4, 8]), num_pages=900))
    sharing = play(engine, alike(draw))
    assert all(sharing[name].last.cached_tokens == 32 for name in "012")  # type: ignore[union-attr]

    jobs, settings = crowd(draw), options(draw, page_entries=draw.choice([1, 2]))
    engine = slots_of(model, slot_visits=visits, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    crowded = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    check_against_forward(model, [*sharing.values(), *crowded.values()])


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("router", BUDGET_ROUTERS)
def test_each_request_has_its_own_mean_depth(router: str, kv_cache: str) -> None:
    draw, model = random.Random(1), calibrated(router, kv_cache=kv_cache)
    jobs = [
        Job(name=f"{mean_depth}", prompt=random_tokens(draw, 9), params=greedy(8, mean_depth=mean_depth))
        for mean_depth in (None, 1.0, 1.4, 2.0, 2.7, 3.0)
    ]
    stories = play(slots_of(model), jobs)
    check_against_forward(model, stories.values())
    assert {token.depth for token in stories["1.0"].tokens} == {1}
    assert {token.depth for token in stories["3.0"].tokens} == {3}


@pytest.mark.parametrize("router", ["none", "expert_choice", "threshold_choice", "token_choice", "random", "fixed"])
def test_no_token_takes_more_than_its_limit(router: str) -> None:
    model, prompt = tiny_model(router=router, sharing="middle_cycle"), random_tokens(random.Random(2), 11)
    jobs = [Job(name=f"{most}", prompt=prompt, params=greedy(8, max_recursions=most)) for most in (1, 2, 3, None)]
    stories = play(slots_of(model), jobs)
    for most in (1, 2, 3):
        check_under(*limit_recursions(model, most), stories[f"{most}"])
    assert stories["3"].ids == stories["None"].ids


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_slots_that_find_no_place_to_turn_wait_for_one(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    model, draw = tiny_model(router="expert_choice"), random.Random(3)
    engine = slots_of(model)
    assert engine.slots is not None
    shape = engine.slots._shape

    def few(**given: int) -> VisitShape:
        whole = shape(**given)
        return replace(whole, turns=min(turns, whole.slots))

    monkeypatch.setattr(engine.slots, "_shape", few)
    jobs = [Job(name=f"{n}", prompt=random_tokens(draw, 3), params=greedy(6)) for n in range(7)]
    check_against_forward(model, play(engine, jobs).values())


@pytest.mark.parametrize("num_recursions", [1, 3])
def test_no_visit_comes_after_the_last_that_can_matter(monkeypatch: pytest.MonkeyPatch, num_recursions: int) -> None:
    """Of known lengths: a first visit to enter, and for each token as many as it takes, whatever a batch holds."""
    model = tiny_model(router="none", num_recursions=num_recursions, sharing="middle_cycle")
    engine, used = slots_of(model, slot_visits=8), list[int]()
    assert engine.slots is not None
    visit = engine.slots._program.visit
    monkeypatch.setattr(engine.slots._program, "visit", lambda shape: used.append(shape.turns) or visit(shape))
    outputs = engine.generate([[1, 2, 3], [4]], [greedy(11), greedy(20)], progress=False)
    assert [len(output.token_ids) for output in outputs] == [11, 20]
    assert len(used) <= num_recursions * (20 + 1)


@pytest.mark.parametrize("router", ["none", "expert_choice", "token_choice"])
def test_slots_may_go_in_step(monkeypatch: pytest.MonkeyPatch, router: str) -> None:
    """All turn together, every R visits; one that came between waits. By default if all take every recursion."""
    model, draw = tiny_model(router=router, sharing="middle_cycle"), random.Random(5)
    engine, used = slots_of(model, lockstep=True), list[int]()
    assert engine.slots is not None
    visit = engine.slots._program.visit
    monkeypatch.setattr(engine.slots._program, "visit", lambda shape: used.append(shape.turns) or visit(shape))
    jobs = [Job(name=f"{n}", prompt=random_tokens(draw, 3), params=greedy(6), at=2 * n) for n in range(5)]
    check_against_forward(model, play(engine, jobs).values())
    turned = [number for number, turns in enumerate(used) if turns]
    assert {later - first for first, later in pairwise(turned)} <= {3} and len(turned) < len(used) / 2
    assert slots_of(model).slots._period == (3 if router == "none" else 1)  # type: ignore[union-attr]
    assert slots_of(model, lockstep=False).slots._period == 1  # type: ignore[union-attr]


def test_a_request_samples_the_same_in_a_slot_and_out_of_one() -> None:
    """All that slots choose by themselves, and beside it what they leave to the host."""
    model, draw = tiny_model(router="expert_choice"), random.Random(4)
    several: list[dict[str, Any]] = [
        dict(temperature=0.8),
        dict(temperature=1.3, top_k=5),
        dict(top_p=0.6),
        dict(min_p=0.1, temperature=0.7),
        dict(top_p=0.9, top_k=20, min_p=0.01),
        dict(top_k=10**30),
        dict(repetition_penalty=1.5),
        dict(logprobs=3),
        dict(min_tokens=4, stop_token_ids=tuple(range(40))),
        dict(presence_penalty=1.0, frequency_penalty=0.5),
    ]
    prompts = [random_tokens(draw, draw.randrange(1, 9)) for _ in several]
    params = [
        SamplingParams(**{"seed": 10 + n, "max_tokens": 9, "logprobs": 0, **each}) for n, each in enumerate(several)
    ]
    assert [fits_slot(each) for each in params] == [True] * 6 + [False] * 4
    inside = slots_of(model).generate(prompts, params, progress=False)
    outside = engine_of(model).generate(prompts, params, progress=False)
    for mine, other in zip(inside, outside, strict=True):
        assert mine.token_ids == other.token_ids and mine.depths == other.depths
        assert (mine.text, mine.finish_reason) == (other.text, other.finish_reason)
        ours, theirs = ([token.logprob for token in output.tokens] for output in (mine, other))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


# ends


def test_stop_tokens_end_a_request_however_many_there_are() -> None:
    model = tiny_model()
    prompt, params = [1, 2, 3], dict(seed=5, max_tokens=30, ignore_eos=True)
    [free] = slots_of(model).generate([prompt], SamplingParams(**params), progress=False)
    wanted = free.token_ids[7]
    first = free.token_ids.index(wanted)
    others = [token for token in range(64) if token not in free.token_ids]
    for stops in ((wanted,), (*others[:12], wanted)):
        [output] = slots_of(model).generate([prompt], SamplingParams(**params, stop_token_ids=stops), progress=False)
        assert output.token_ids == free.token_ids[: first + 1] and output.finish_reason == "stop"
        assert output.text == "".join(token.text for token in free.tokens[:first])


def test_a_stop_string_ends_a_request_inside_a_batch() -> None:
    model = tiny_model(vocab_size=300, router="expert_choice")
    params = dict(seed=1, max_tokens=40, ignore_eos=True)
    [free] = engine_of(model).generate([[65, 66]], SamplingParams(**params), progress=False)
    stop = next(free.text[n : n + 2] for n in range(6, 20) if free.text[n : n + 2].isascii())
    [planned] = engine_of(model).generate([[65, 66]], SamplingParams(**params, stop=(stop,)), progress=False)
    engine = slots_of(model, slot_visits=5)
    [output] = engine.generate([[65, 66]], SamplingParams(**params, stop=(stop,)), progress=False)
    assert (output.text, output.token_ids) == (planned.text, planned.token_ids) and output.finish_reason == "stop"
    check_all_free(engine)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_a_row_of_nan_fails_alone(kv_cache: str) -> None:
    model, draw = poisoned(kv_cache), random.Random(0)
    stem = tuple(min(token, 62) for token in random_tokens(draw, 36))
    good = [Job(name=f"good-{n}", prompt=(*stem[: 5 + n], n + 1), params=greedy(6), at=n) for n in range(5)]
    bad = [Job(name=f"bad-{n}", prompt=(*stem, 63), params=greedy(6), at=2 * n) for n in range(3)]
    later = [Job(name=f"later-{n}", prompt=(*stem, n + 1), params=greedy(6), at=40) for n in range(3)]
    stories = play(slots_of(model, page_entries=4, prefill_chunk=64), [*good, *bad, *later])
    for job in bad:
        output = stories[job.name].last
        assert output is not None and output.finish_reason == "error" and not output.token_ids
        assert output.error is not None and "NaN" in output.error
    check_against_forward(model, [stories[job.name] for job in (*good, *later)])
    assert all(len(stories[job.name].tokens) == 6 for job in (*good, *later))


# crowds and failures


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_a_crowd_on_a_pool_too_small_for_it(kv_cache: str) -> None:
    model, jobs = very_small(router="expert_choice", kv_cache=kv_cache), large_crowd(0, 200)
    settings = dict(page_entries=2, max_requests=16, max_visit_tokens=24, prefill_chunk=8)
    engine = slots_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > 2
    check_against_forward(model, [s for s in stories.values() if s.job.params.max_recursions is None])


def test_a_batch_that_breaks_off_ends_the_requests_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slots_of(tiny_model(router="expert_choice"))
    assert engine.slots is not None
    engine.add_request("old", [1, 2, 3], greedy(9))
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.slots._program, "visit", lambda shape: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.add_request("new", [4, 5], greedy(3))
    outputs = {output.id: output for output in drain(engine) if output.finished}
    assert outputs["old"].finish_reason == "error" and outputs["old"].error == "ZeroDivisionError: division by zero"
    assert outputs["new"].finish_reason == "length"
    check_all_free(engine)


def test_a_prompt_that_breaks_off_leaves_the_slots_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(router="expert_choice")
    engine = slots_of(model, slot_visits=2)
    engine.add_request("old", [1, 2, 3], greedy(20))
    told = [token for _ in range(4) for output in engine.step() for token in output.token_ids]
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "visit", lambda segments: 1 / 0)
        engine.add_request("new", [4, 5, 6], greedy(3))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    outputs = drain(engine)
    assert [output.error for output in outputs if output.id == "new"] == ["ZeroDivisionError: division by zero"]
    told += [token for output in outputs if output.id == "old" for token in output.token_ids]
    [alone] = engine_of(model).generate([[1, 2, 3]], greedy(20), progress=False)
    assert told == list(alone.token_ids)
    check_all_free(engine)


def test_slots_that_broke_off_are_emptied_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of requests that had just ended, too: else they would write on into pages of others."""
    engine = slots_of(tiny_model(router="expert_choice"))
    assert engine.slots is not None
    state = engine.slots._state
    for name in "ab":
        engine.add_request(name, [1, 2, 3], greedy(30))
    for _ in range(3):
        engine.step()
    assert engine.abort("b")
    with monkeypatch.context() as patch:
        patch.setattr(state, "edit", lambda edits: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.add_request("c", [4], greedy(2))
    engine.step()
    engine.step()
    assert engine.slots.has_strays is False
    assert int((state.ints[:-1, Int.LIVE] > 0).sum()) <= 1
    drain(engine)
    check_all_free(engine)


@pytest.mark.parametrize("count", [1, NUM_STOPS + 4])
def test_only_the_host_knows_of_more_stop_tokens_than_a_slot_holds(count: int) -> None:
    """A slot that does not know that it ended goes on for a while, and pages it may write to must wait for that."""
    model = tiny_model()
    [free] = engine_of(model).generate([[1, 2, 3]], greedy(12), progress=False)
    wanted = free.token_ids[4]
    others = [token for token in range(wanted) if token not in free.token_ids][: count - 1]
    engine = slots_of(model, slot_visits=2)
    assert engine.slots is not None
    engine.add_request("0", [1, 2, 3], greedy(12, stop_token_ids=(*others, wanted)))
    engine.add_request("1", [5], greedy(30))
    strays = []
    while engine.has_unfinished:
        engine.step()
        strays.append(engine.slots.has_strays)
    assert any(strays) == (len(others) >= NUM_STOPS)
    check_all_free(engine)


# what cannot have slots, and how many there are


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "not 'dynamic'"),
    ],
)
def test_models_without_slots(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(tiny_model(**model), slots=True)
    assert engine_of(tiny_model(**model)).slots is None


def test_a_visit_is_as_large_as_it_must_be() -> None:
    engine = slots_of(tiny_model(), max_requests=40, num_pages=4000)
    assert engine.slots is not None
    seen = set()
    for n in range(30):
        engine.add_request(f"{n}", [n + 1, 2], greedy(4 if n > 2 else 12))
    while engine.has_unfinished:
        engine.step()
        if engine.slots._tenants:
            seen.add(engine.slots._shape(num_new=0).slots)
    assert max(seen) == 32 and min(seen) <= 4 and seen <= set(SIZES)


def test_visits_that_requests_will_need_are_captured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slots_of(tiny_model(router="expert_choice"), max_requests=6)
    assert engine.slots is not None
    prepared = set[VisitShape]()
    monkeypatch.setattr(engine.slots._graphs, "prepare", prepared.update)
    engine.warm_up()
    assert {shape.slots for shape in prepared} == {1, 2, 4, 6} and len(prepared) <= 8
    used = set[VisitShape]()
    monkeypatch.setattr(engine.slots._program, "visit", used.add)
    for n in range(6):
        engine.add_request(f"{n}", [n + 1], greedy(4))
    for _ in range(4):
        engine.step()
    assert used and all(any(serves(large, small) for large in prepared) for small in used)
    wide = slots_of(tiny_model(num_recursions=1, sharing="none", max_position_embeddings=4096), num_pages=9000)
    assert wide.slots is not None
    monkeypatch.setattr(wide.slots._graphs, "prepare", prepared.update)
    wide.slots.warm_up([4], [1, 600, 2100])
    assert {s.longest for s in prepared if s.slots == 4 and s.turns == 4} >= {512, 2048, 4096}


def test_what_was_missed_is_captured_when_no_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slots_of(tiny_model(router="expert_choice"), max_requests=2)
    assert engine.slots is not None
    captured = iter([True, True, False])
    monkeypatch.setattr(engine.slots._graphs, "prepare_missing", lambda: next(captured))
    engine.add_request("a", [1, 2], greedy(3))
    assert not engine.warm_up_one()  # a request waits
    engine.abort("a")
    assert [engine.warm_up_one() for _ in range(3)] == [True, True, False]
