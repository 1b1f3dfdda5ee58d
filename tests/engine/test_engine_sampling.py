"""Seeds, several samples, stops and lengths, as a caller of the engine sees them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from tests.engine.workload import Job, engine_of, greedy, play, random_tokens, tight_pool
from tests.tiny import tiny_model

PROMPT = (33, 7, 50, 41)


def sampled(max_tokens: int = 10, **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 1.5, "seed": 11, "ignore_eos": True, **params})


def one(params: SamplingParams, prompt: tuple[int, ...] = PROMPT, **changes: Any) -> RequestOutput:
    """What a request gives alone."""
    [output] = engine_of(tiny_model(**changes)).generate([prompt], params, progress=False)
    return output


def ids(output: RequestOutput) -> list[int]:
    return [token.token for token in output.tokens]


# seeds


@pytest.mark.parametrize("router", ["none", "expert_choice", "token_choice"])
def test_a_seeded_request_is_the_same_in_any_company(router: str) -> None:
    draw, model = random.Random(0), tiny_model(router=router, sharing="middle_cycle")
    jobs = [
        Job(
            name=f"{number}",
            prompt=random_tokens(draw, draw.randrange(1, 8)),
            params=sampled(12, seed=number, temperature=draw.choice([0.7, 1.0, 2.0]), top_k=draw.choice([0, 5])),
            at=draw.randrange(4),
        )
        for number in range(6)
    ]
    alone = {job.name: one(job.params, job.prompt, router=router, sharing="middle_cycle") for job in jobs}
    roomy = play(engine_of(model), jobs)
    settings = dict(page_entries=1, prefill_chunk=3, max_visit_tokens=8)
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    crowded = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    for name, output in alone.items():
        assert ids(output) == roomy[name].ids == crowded[name].ids
    assert len({tuple(ids(output)) for output in alone.values()}) == len(jobs)


def test_samples_of_one_prompt_differ_and_come_again() -> None:
    first, second = (engine_of(tiny_model()).generate([PROMPT], sampled(n=4, seed=5), progress=False) for _ in range(2))
    assert [output.id for output in first] == [f"prompt-0-{number}" for number in range(4)]
    assert list(map(ids, first)) == list(map(ids, second))
    assert len({tuple(ids(output)) for output in first}) == 4
    assert list(map(ids, first)) == [ids(one(sampled(seed=5 + number))) for number in range(4)]


def test_requests_without_a_seed_differ_and_follow_the_engines() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = engine_of(tiny_model(), seed=seed)
        return [ids(output) for output in engine.generate([PROMPT] * 2, sampled(seed=None), progress=False)]

    assert run(0) == run(0) != run(1)
    assert run(0)[0] != run(0)[1]


# where an output ends


def test_length() -> None:
    output = one(greedy(7))
    assert (len(output.tokens), output.finish_reason) == (7, "length")
    most = engine_of(tiny_model(), max_length=10).generate([PROMPT], greedy(100), progress=False)[0]
    assert (len(most.tokens), most.finish_reason) == (6, "length")
    assert ids(most) == ids(output)[:6]


def test_a_stop_string_ends_the_text_before_it() -> None:
    whole = one(sampled(40))
    printable = [token for token in whole.tokens if token.text and token.text.isprintable()]
    stop = printable[5].text
    output = one(sampled(40, stop=stop))
    assert output.finish_reason == "stop"
    assert output.text == whole.text.split(stop)[0] and stop in whole.text
    assert ids(output) == ids(whole)[: len(output.tokens)] and ids(output)[-1] == ord(stop)


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_certain() -> None:
    whole = one(sampled(12))
    stop = whole.text[3:5] + "never"
    output = one(sampled(12, stop=stop))
    assert output.text == whole.text and ids(output) == ids(whole) and output.finish_reason == "length"
    assert [token.text for token in output.tokens] != [token.text for token in whole.tokens]


def test_a_stop_token_ends_the_output_and_belongs_to_it() -> None:
    whole = ids(one(sampled(20)))
    stop = next(token for token in whole if token != whole[0])
    output = one(sampled(20, stop_token_ids=(stop,)))
    assert ids(output) == whole[: whole.index(stop) + 1] and output.finish_reason == "stop"


@pytest.mark.parametrize("slots", [False, True])
def test_numbers_far_beyond_the_vocabulary_limit_nothing(slots: bool) -> None:
    engine, params = engine_of(tiny_model(), slots=slots), dict(max_tokens=6, seed=3, ignore_eos=True)
    far = [dict(top_k=2**63), dict(seed=3 + 2**64), dict(logprobs=2**70)]
    outputs = [
        engine.generate([[1, 2], [3]], SamplingParams(**{**params, **changes}), progress=False)
        for changes in [{}, *far]
    ]
    assert len({tuple(map(tuple, (output.token_ids for output in each))) for each in outputs}) == 1


def test_the_end_of_a_text() -> None:
    """The token that the model's generation settings name, unless it is to be ignored or comes too early."""

    def run(**params: Any) -> RequestOutput:
        model = tiny_model()
        assert model.generation_config is not None
        model.generation_config.eos_token_id = end
        [output] = engine_of(model).generate([PROMPT], sampled(20, **params), progress=False)
        return output

    whole = ids(one(sampled(20)))
    end = whole[2]
    place = whole.index(end) + 1
    assert (ids(run(ignore_eos=False)), run(ignore_eos=False).finish_reason) == (whole[:place], "stop")
    assert (ids(run()), run().finish_reason) == (whole, "length")
    late = ids(run(ignore_eos=False, min_tokens=8))
    assert end not in late[:8] and len(late) >= 8


def test_no_stop_token_before_min_tokens() -> None:
    whole = ids(one(greedy(12)))
    output = ids(one(greedy(12, min_tokens=5, stop_token_ids=(whole[0],))))
    assert len(output) >= 5 and whole[0] not in output[:5]


# log-probabilities


@pytest.mark.parametrize("router", ["none", "expert_choice"])
def test_log_probabilities_are_the_models_before_anything_else(router: str) -> None:
    """Temperature, penalties and filters change what is drawn, not what is told of it."""
    params = sampled(8, logprobs=3, top_k=9, repetition_penalty=1.5, presence_penalty=1.0)
    model = tiny_model(router=router)
    output = one(params, router=router)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *ids(output)]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    best = expected.topk(3)
    for row, token in enumerate(output.tokens):
        assert token.logprob == pytest.approx(float(expected[row, token.token]), abs=1e-4)
        assert [number for number, _ in token.top_logprobs] == best.indices[row].tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values[row].tolist(), abs=1e-4)
    assert ids(output) != logits.argmax(-1).tolist()


def test_log_probabilities_are_told_when_asked_for() -> None:
    none, chosen = one(greedy(2, logprobs=None)), one(greedy(2, logprobs=0))
    assert [(token.logprob, token.top_logprobs) for token in none.tokens] == [(None, ())] * 2
    assert all(token.logprob is not None and token.top_logprobs == () for token in chosen.tokens)


def test_penalties_count_the_output_so_far() -> None:
    plain, penalised = one(greedy(12)), one(greedy(12, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(ids(plain))) < len(set(ids(penalised)))
