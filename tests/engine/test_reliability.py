"""What goes wrong stays where it is: crowds on a pool that is too small, broken rows, visits that break off."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mor.engine.engine import Engine
from mor.engine.request import Segment, SegmentResult
from mor.engine.slot_runner import SlotRunner
from mor.model.modeling_mor import MorForCausalLM
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
from tests.tiny import KV_CACHES, tiny_model

POISON = 63


def very_small(**changes: Any) -> MorForCausalLM:
    settings = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_recursions=3,
        sharing="cycle",
    )
    return tiny_model(**{**settings, **changes})


# crowds


def crowd(seed: int, count: int) -> list[Job]:
    """Requests of a few beginnings, arriving faster than they are served; every eighth is aborted at some time."""
    draw = random.Random(seed)
    stems = [random_tokens(draw, 34) for _ in range(3)]

    def job(number: int) -> Job:
        at = draw.randrange(count)
        stem = draw.choice(stems) if draw.random() < 0.2 else ()
        return Job(
            name=f"{number}",
            prompt=(*stem, *random_tokens(draw, draw.randrange(1, 9))),
            params=greedy(draw.randrange(1, 25), max_recursions=draw.choice([None, None, 2])),
            at=at,
            abort_at=at + draw.randrange(60) if number % 8 == 0 else None,
        )

    return [job(number) for number in range(count)]


def check_crowd(model: MorForCausalLM, jobs: list[Job]) -> None:
    """Every request ends, all pages come back, and outputs are those of requests alone."""
    settings = dict(page_entries=2, max_requests=16, max_visit_tokens=24, prefill_chunk=8)
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > len(jobs) / 100
    assert any(story.last and story.last.cached_tokens for story in stories.values())
    unlimited = [story for story in stories.values() if story.job.params.max_recursions is None]
    for start in range(0, len(unlimited), 200):
        check_against_forward(model, unlimited[start : start + 200])
    lone = engine_of(model, prefix_caching=False)
    limited = [story for story in stories.values() if story.job.params.max_recursions is not None and story.tokens]
    for story in limited[:20]:
        [output] = lone.generate([story.job.prompt], story.job.params, progress=False)
        assert [token.token for token in output.tokens][: len(story.tokens)] == story.ids


@pytest.mark.parametrize(("kv_cache", "count"), [("recursion", 300), ("hybrid", 100)])
def test_a_crowd_on_a_pool_too_small_for_it(kv_cache: str, count: int) -> None:
    check_crowd(very_small(router="expert_choice", kv_cache=kv_cache), crowd(0, count))


@pytest.mark.slow
def test_ten_thousand_requests_on_a_pool_too_small_for_them() -> None:
    check_crowd(very_small(router="expert_choice"), crowd(1, 10_000))


# broken rows


def poisoned(kv_cache: str, router: str = "expert_choice", token: int = POISON) -> MorForCausalLM:
    """A model for which one token is not a number."""
    model = tiny_model(router=router, kv_cache=kv_cache)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer the embedding's
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    return model


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_a_row_of_nan_fails_alone(kv_cache: str) -> None:
    """Beside it, after it on the same pages, and with the same beginning."""
    model = poisoned(kv_cache)
    stem = random_tokens(random.Random(0), 36)
    stem = tuple(min(token, POISON - 1) for token in stem)
    good = [Job(name=f"good-{n}", prompt=(*stem[: 5 + n], n + 1), params=greedy(6), at=n) for n in range(5)]
    bad = [Job(name=f"bad-{n}", prompt=(*stem, POISON), params=greedy(6), at=2 * n) for n in range(3)]
    later = [Job(name=f"later-{n}", prompt=(*stem, n + 1), params=greedy(6), at=40) for n in range(3)]
    jobs = [*good, *bad, *later]
    settings = dict(page_entries=4, prefill_chunk=64)
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=60), **settings)
    stories = play(engine, jobs)
    for job in bad:
        output = stories[job.name].last
        assert output is not None and output.finish_reason == "error" and not output.tokens
        assert output.error == "the logits hold NaN"
    check_against_forward(model, [stories[job.name] for job in (*good, *later)])
    assert all(len(stories[job.name].tokens) == 6 for job in (*good, *later))


@pytest.mark.parametrize("at", [3, 4, 5])
def test_nan_behind_a_prefix_is_not_copied_with_it(at: int) -> None:
    """While the token that breaks a request is in flight, another copies the page into which it writes."""
    stem = random_tokens(random.Random(0), 34)
    [whole] = engine_of(tiny_model(router="gate")).generate([stem], greedy(1), progress=False)
    token = whole.tokens[0].token
    assert token not in stem
    model = poisoned("recursion", "gate", token)
    last = token % 60 + 1
    jobs = [
        Job(name="breaks", prompt=stem, params=greedy(3)),
        Job(name="copies", prompt=(*stem[:32], last), params=greedy(1), at=at),
    ]
    stories = play(engine_of(model, page_entries=12), jobs)
    broken, copied = stories["breaks"].last, stories["copies"].last
    assert broken is not None and broken.error == "the logits hold NaN"
    assert copied is not None and copied.cached_tokens == 32
    check_against_forward(model, [stories["copies"]])
    assert len(stories["copies"].tokens) == 1


def test_a_row_whose_head_breaks_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway through its output; what it said before stays."""
    model = tiny_model()
    engine = engine_of(model)
    head, calls = model.lm_head.forward, []

    def broken(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        calls.append(len(logits))
        if len(calls) == 3:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(model.lm_head, "forward", broken)
    outputs = engine.generate([[1, 2], [3, 4], [5, 6]], greedy(5), progress=False)
    monkeypatch.undo()
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert [output.error for output in outputs] == [None, "the logits hold NaN", None]
    whole = engine_of(model).generate([[1, 2], [3, 4], [5, 6]], greedy(5), progress=False)
    lengths = [5, 2, 5]
    for output, alone, length in zip(outputs, whole, lengths, strict=True):
        assert [t.token for t in output.tokens] == [t.token for t in alone.tokens][:length]
    check_all_free(engine)


# visits that break off


def break_once(monkeypatch: pytest.MonkeyPatch, engine: Engine, *, visit: int, halfway: bool) -> None:
    """Let a visit raise: when its work is done, or in the middle of its layers."""
    runner, calls = engine.runner, []
    name = "_merge" if halfway else "visit"
    method = getattr(runner, name)

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        result = method(*arguments)
        if len(calls) == visit:
            raise RuntimeError("out of everything")
        return result

    monkeypatch.setattr(runner, name, broken)


@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("kv_cache", ["recursion", "hybrid"])
def test_a_visit_that_breaks_off_is_heard_of_and_ends_its_requests(
    monkeypatch: pytest.MonkeyPatch, kv_cache: str, halfway: bool
) -> None:
    model = tiny_model(router="expert_choice", kv_cache=kv_cache)
    engine = engine_of(model, max_requests=2)
    jobs = [Job(name=f"{n}", prompt=(n + 1, n + 2), params=greedy(4)) for n in range(5)]
    break_once(monkeypatch, engine, visit=4, halfway=halfway)
    for job in jobs:
        engine.add_request(job.name, job.prompt, job.params)
    with pytest.raises(RuntimeError, match="out of everything"):
        drain(engine)
    assert engine.runner._cohorts == [] and engine.runner._logits == {}
    heard = {output.id: output for output in drain(engine) if output.finished}
    assert set(heard) == {job.name for job in jobs}
    failed = [name for name, output in heard.items() if output.finish_reason == "error"]
    assert failed == ["0", "1"]  # in the fourth visit nobody had ended yet
    assert {heard[name].error for name in failed} == {"RuntimeError: out of everything"}
    check_all_free(engine)
    rest = engine_of(model).generate([job.prompt for job in jobs[2:]], greedy(4), progress=False)
    again = engine.generate([job.prompt for job in jobs[2:]], greedy(4), progress=False)
    assert [[t.token for t in a.tokens] for a in again] == [[t.token for t in r.tokens] for r in rest]


def test_generate_raises_what_a_visit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests are gone then, and the engine goes on."""
    engine = engine_of(tiny_model(router="token_choice"))
    break_once(monkeypatch, engine, visit=3, halfway=False)
    with pytest.raises(RuntimeError, match="out of everything"):
        engine.generate([[4], [5, 6]], greedy(9), progress=False)
    assert engine.step() == []
    check_all_free(engine)
    assert len(engine.generate([[4]], greedy(2), progress=False)[0].tokens) == 2


def test_generate_is_not_for_an_engine_that_others_step() -> None:
    engine = engine_of(tiny_model(router="token_choice"))
    engine.add_request("other", [1, 2, 3], greedy(2))
    with pytest.raises(ValueError, match="generate needs an engine without other requests"):
        engine.generate([[4]], greedy(9), progress=False)
    told = []
    while engine.has_unfinished:
        told += engine.step()
    assert [output.id for output in told] == ["other"] * len(told) and told[-1].finish_reason == "length"
    assert len(engine.generate([[4]], greedy(2), progress=False)[0].tokens) == 2


def test_a_visit_that_always_breaks_off_fails_everyone_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_model(), max_requests=1)

    def broken(_: list[Segment]) -> list[SegmentResult]:
        raise RuntimeError("gone")

    monkeypatch.setattr(engine.runner, "visit", broken)
    for number in range(3):
        engine.add_request(f"{number}", [1], greedy(2))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="gone"):
            engine.step()
    assert [(output.id, output.finish_reason) for output in engine.step()] == [(f"{n}", "error") for n in range(3)]
    check_all_free(engine)


def test_sampling_that_breaks_off_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_model())

    def broken(*_: Any) -> None:
        raise RuntimeError("no sample")

    monkeypatch.setattr("mor.engine.engine.sample", broken)
    engine.add_request("0", [1], greedy(2))
    with pytest.raises(RuntimeError, match="no sample"):
        engine.step()
    [output] = engine.step()
    assert output.error == "RuntimeError: no sample"
    check_all_free(engine)


def test_what_a_step_brought_before_a_visit_broke_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """While slots are busy a step makes several planned visits: one may end a request, and the next one break off."""
    engine = engine_of(tiny_model(router="expert_choice"), slots=True, slot_visits=2)
    monkeypatch.setattr(SlotRunner, "is_busy", property(lambda slots: slots.in_flight > 1))
    engine.add_request("slot", [1, 2], greedy(40))
    for _ in range(4):
        engine.step()
    engine.add_request("short", [3, 4], greedy(1, logprobs=2))
    engine.add_request("long", [3, 5], greedy(9, logprobs=2))
    short, visit = engine.scheduler.waiting[0], engine.runner.visit

    def broken(segments: list[Segment]) -> list[SegmentResult]:
        if short.state == "finished":
            raise RuntimeError("out of everything")
        return visit(segments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "visit", broken)
        with pytest.raises(RuntimeError, match="out of everything"):
            drain(engine)
    ended = {output.id: output for output in drain(engine) if output.finished}
    assert {name: output.finish_reason for name, output in ended.items()} == {
        "slot": "length",
        "short": "length",
        "long": "error",
    }
    assert len(ended["short"].tokens) == 1
    check_all_free(engine)


# aborts


def test_aborts_at_any_moment() -> None:
    """Waiting, in flight at every recursion, decoding; the others are not disturbed."""
    model = tiny_model(router="expert_choice", kv_cache="hybrid")
    prompts = [random_tokens(random.Random(n), 7) for n in range(3)]
    for moment in range(14):
        jobs = [
            Job(name=f"{n}", prompt=prompt, params=greedy(4), abort_at=moment if n == 1 else None)
            for n, prompt in enumerate(prompts)
        ]
        stories = play(engine_of(model, prefill_chunk=3, max_requests=2), jobs)
        assert [len(stories[name].tokens) for name in "02"] == [4, 4]
        check_against_forward(model, stories.values())


def test_aborting_what_is_not_there() -> None:
    engine = engine_of(tiny_model())
    assert engine.abort("nobody") is False
    engine.add_request("0", [1], greedy(1))
    assert engine.abort("0") is True and engine.abort("0") is False
    check_all_free(engine)
