"""The log-probabilities of a prompt are those of the model's full forward, whatever shares the visits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mor.engine import prompt_scores
from mor.engine.engine import Engine
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.engine.slots import fits_slot
from mor.model.calibrate import calibrate
from mor.model.modeling_mor import MorForCausalLM
from tests.engine.native.test_library import needs_compiler
from tests.engine.workload import (
    Job,
    check_against_forward,
    check_all_free,
    engine_of,
    greedy,
    play,
    random_tokens,
    tight_pool,
)
from tests.tiny import architectures, label, random_ids, tiny_model

POISON = 63


def scoring(max_tokens: int = 0, k: int = 0, **params: Any) -> SamplingParams:
    """Score the prompt, and go on greedily."""
    return greedy(max_tokens, prompt_logprobs=k, **params)


def check_scores(model: MorForCausalLM, prompt: tuple[int, ...], output: RequestOutput, k: int, **forward: Any) -> None:
    """The full forward says the same of every token of the prompt."""
    with torch.no_grad():
        full = model(torch.tensor([prompt]), **forward)
    expected_TV = full.logits[0, :-1].log_softmax(-1)
    assert output.prompt_logprobs[0] is None and output.prompt_depths[0] is None and output.prompt_tops[0] == ()
    assert output.prompt_depths[1:] == full.depths[0, :-1].tolist()
    found = torch.tensor(output.prompt_logprobs[1:], dtype=torch.float32)
    chosen = expected_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, chosen, atol=2e-5, rtol=0)
    best = expected_TV.topk(k)
    assert [[token for token, _ in top] for top in output.prompt_tops[1:]] == best.indices.tolist()
    values = [value for top in output.prompt_tops[1:] for _, value in top]
    assert values == pytest.approx(best.values.flatten().tolist(), abs=2e-5)


def crowd(draw: random.Random) -> list[Job]:
    """Short prompts and long outputs, then longer prompts of which most are scored alone; one is aborted."""
    first = [scoring(20, 2), greedy(24), scoring(16), greedy(20)]
    then = [scoring(0, 1), scoring(4, 1), scoring(0, 3), scoring(1)]
    return [
        *(
            Job(
                name=f"early-{n}", prompt=random_tokens(draw, draw.randrange(1, 6)), params=params, at=draw.randrange(3)
            )
            for n, params in enumerate(first)
        ),
        *(
            Job(name=f"late-{n}", prompt=random_tokens(draw, draw.randrange(9, 20)), params=params, at=5 * (n + 1))
            for n, params in enumerate(then)
        ),
        Job(name="gone", prompt=random_tokens(draw, 15), params=scoring(3), at=4, abort_at=draw.randrange(6, 40)),
    ]


@pytest.mark.parametrize("architecture", architectures(), ids=map(label, architectures()))
def test_scores_are_the_models(architecture: dict[str, str]) -> None:
    """Chunks, preemptions, aborts, and others in the same visits; outputs are what they are without scores."""
    draw = random.Random(architectures().index(architecture))
    model, jobs = tiny_model(**architecture), crowd(draw)
    settings: dict[str, Any] = dict(
        page_entries=draw.choice([1, 2]),
        max_visit_tokens=draw.choice([4, 16, 64]),
        prefill_chunk=draw.choice([3, 5, 32]),
    )
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    for name, story in stories.items():
        params = story.job.params
        if params.prompt_logprobs is not None and name != "gone":
            assert story.last is not None and len(story.tokens) == params.max_tokens
            check_scores(model, story.job.prompt, story.last, params.prompt_logprobs)
    check_against_forward(model, stories.values())


def test_what_was_scored_before_a_preemption_is_kept_and_not_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt gives way between its chunks; every row goes through the head once."""
    draw, model = random.Random(5), tiny_model(router="gate")
    jobs = [
        Job(name="old", prompt=random_tokens(draw, 12), params=greedy(60)),
        Job(name="young", prompt=random_tokens(draw, 60), params=scoring(2, 1), at=2),
    ]
    settings: dict[str, Any] = dict(page_entries=1, max_visit_tokens=8, prefill_chunk=4, prefix_caching=False)
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    rows, log_probabilities, halfway = list[int](), prompt_scores.log_probabilities, list[int]()

    def counted(logits: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(logits))
        return log_probabilities(logits, *rest)

    def preempt(request: Any, plan: Any, preempt: Any = engine.scheduler._preempt) -> None:
        halfway.append(len(request.scores))
        preempt(request, plan)

    monkeypatch.setattr(prompt_scores, "log_probabilities", counted)
    monkeypatch.setattr(engine.scheduler, "_preempt", preempt)
    young = play(engine, jobs)["young"]
    assert any(0 < count < 59 for count in halfway)
    assert sum(rows) == 59
    assert young.last is not None
    check_scores(model, young.job.prompt, young.last, 1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_chunks_and_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch, chunk: int, rows: int) -> None:
    """And logits of no more rows than that exist at a time."""
    monkeypatch.setattr(prompt_scores, "ROWS_AT_ONCE", rows)
    model = tiny_model(router="expert_choice")
    engine = engine_of(model, prefill_chunk=chunk, max_visit_tokens=64)
    head, most = engine.runner._layers.logits, list[int]()
    monkeypatch.setattr(engine.runner._layers, "logits", lambda *args: most.append(len(args[2])) or head(*args))
    prompts = [random_tokens(random.Random(seed), 23) for seed in range(3)]
    for prompt, output in zip(prompts, engine.generate(prompts, scoring(0, 2), progress=False)):
        check_scores(model, prompt, output, 2)
    assert max(most) <= rows and sum(most) == 3 * 22


@pytest.mark.parametrize("native", [False, pytest.param(None, marks=needs_compiler)], ids=["plain", "native"])
@pytest.mark.parametrize("architecture", [dict(router="expert_choice"), dict(router="token_choice", kv_cache="shared")])
def test_requests_in_slots_are_scored_too(architecture: dict[str, str], native: bool | None) -> None:
    model = tiny_model(**architecture)
    jobs = [
        Job(name=f"{number}", prompt=prompt, params=params, at=number)
        for number, params in enumerate([scoring(5, 2), greedy(8), scoring(0, 2), scoring(7, 2), scoring(1, 2)])
        for prompt in [random_tokens(random.Random(number), 3 * number + 1)]
    ]
    engine = engine_of(model, slots=True, native=native, prefill_chunk=4, max_requests=4)
    stories = play(engine, jobs)
    for story in stories.values():
        assert story.last is not None and len(story.tokens) == story.job.params.max_tokens
        if story.job.params.prompt_logprobs is not None:
            check_scores(model, story.job.prompt, story.last, 2)
    check_against_forward(model, stories.values())


def test_prompts_that_are_scored_take_nothing_from_the_prefix_cache_but_give_to_it() -> None:
    model, stem = tiny_model(router="expert_choice"), random_tokens(random.Random(1), 40)
    jobs = [
        Job(name=name, prompt=(*stem, number), params=params, at=40 * number)
        for number, (name, params) in enumerate([("scored", scoring(0)), ("plain", greedy(2)), ("again", scoring(2))])
    ]
    stories = play(engine_of(model), jobs)
    assert [story.last.cached_tokens for story in stories.values() if story.last] == [0, 32, 0]
    for name in ("scored", "again"):
        last = stories[name].last
        assert last is not None
        check_scores(model, stories[name].job.prompt, last, 0)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("mean_depth", [1.0, 1.6, 2.5, None])
def test_scores_follow_the_budget(mean_depth: float | None, most: int) -> None:
    """What a request generated under a budget scores as it was generated."""
    model = tiny_model(router="expert_choice")
    calibrate(model, [random_ids(8, 40, seed=5)], mean_depths=[1, 1.5, 2, 2.5, 3])
    engine, prompt = engine_of(model), random_tokens(random.Random(2), 9)
    [whole] = engine.generate([prompt], scoring(mean_depth=mean_depth), progress=False)
    check_scores(model, prompt, whole, 0, mean_depth=mean_depth)
    [output] = engine.generate([prompt], greedy(8, mean_depth=mean_depth, max_recursions=most), progress=False)
    row = (*prompt, *output.token_ids)
    [scored] = engine.generate([row], scoring(mean_depth=mean_depth, max_recursions=most), progress=False)
    assert scored.prompt_logprobs[9:] == pytest.approx([token.logprob for token in output.tokens], abs=1e-4)
    assert scored.prompt_depths[9:] == list(output.depths)


# the edges


def one(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    [output] = engine.generate([prompt], params, progress=False)
    check_all_free(engine)
    return output


@pytest.mark.parametrize("slots", [False, True])
def test_a_prompt_alone(slots: bool) -> None:
    """Nothing is generated; a prompt may then be as long as the model allows, or have nothing to score."""
    engine = engine_of(tiny_model(router="expert_choice"), max_length=30, slots=slots)
    whole = one(engine, [7] * 30, scoring())
    assert (whole.finished, whole.finish_reason, whole.text, list(whole.token_ids)) == (True, "length", "", [])
    assert len(whole.prompt_logprobs) == 30 and whole.mean_depth is None
    assert one(engine, [7], scoring()).prompt_logprobs == [None]
    assert one(engine, [7], scoring(3)).prompt_logprobs == [None]
    with pytest.raises(ValueError, match=r"max_length=30 leaves room for at most 30$"):
        engine.add_request("long", [7] * 31, scoring())
    with pytest.raises(ValueError, match="max_length=30 leaves room for at most 29 and one of output"):
        engine.add_request("long", [7] * 30, scoring(1))


def test_a_prompt_alone_needs_pages_for_itself_and_no_slot() -> None:
    engine = engine_of(tiny_model(), num_pages=21, slots=False)
    most = engine.scheduler.shape.most_tokens(21)
    assert len(one(engine, [7] * most, scoring()).prompt_logprobs) == most
    with pytest.raises(ValueError, match="num_pages=21; shorten the prompt"):
        engine.add_request("long", [7] * (most + 1), scoring())
    assert fits_slot(scoring(1)) and not fits_slot(scoring())


def test_scores_come_when_asked_for() -> None:
    engine = engine_of(tiny_model())
    plain = one(engine, [3, 4, 5], greedy(2))
    assert plain.prompt_scores is None and plain.prompt_logprobs == plain.prompt_tops == plain.prompt_depths == []
    bare = one(engine, [3, 4, 5], scoring(2))
    assert bare.prompt_tops == [(), (), ()] and len(one(engine, [3, 4], scoring(0, 99)).prompt_tops[1]) == 64
    assert [token.token for token in bare.tokens] == [token.token for token in plain.tokens]


def test_samples_of_one_prompt_are_all_scored() -> None:
    engine = engine_of(tiny_model())
    params = SamplingParams(n=2, max_tokens=3, seed=1, prompt_logprobs=1)
    first, second = engine.generate([[3, 4, 5]], params, progress=False)
    assert first.prompt_logprobs == pytest.approx(second.prompt_logprobs) and len(first.prompt_logprobs) == 3


@pytest.mark.parametrize("at", range(12))
def test_an_abort_at_any_time_leaves_nothing_behind(at: int) -> None:
    model = tiny_model(router="gate")
    prompts = [random_tokens(random.Random(seed), 11) for seed in range(2)]
    jobs = [
        Job(name="gone", prompt=prompts[0], params=scoring(2, 1), abort_at=at),
        Job(name="stays", prompt=prompts[1], params=scoring(0, 1)),
    ]
    last = play(engine_of(model, prefill_chunk=4, max_visit_tokens=8), jobs)["stays"].last
    assert last is not None
    check_scores(model, prompts[1], last, 1)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_prompt_whose_logits_are_broken_fails_alone(max_tokens: int) -> None:
    model = tiny_model(router="expert_choice")

    def poison(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == POISON)[..., None], torch.nan)

    model.model.embed_tokens.register_forward_hook(poison)
    engine = engine_of(model, prefill_chunk=4)
    prompts = [[5, POISON, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10]]
    broken, whole = engine.generate(prompts, scoring(max_tokens), progress=False)
    assert broken.finish_reason == "error" and broken.error == "the logits of the prompt hold NaN or infinity"
    assert whole.error is None and len(whole.prompt_logprobs) == 6 and len(whole.tokens) == max_tokens
    check_all_free(engine)
