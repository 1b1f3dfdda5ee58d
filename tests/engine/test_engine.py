"""Whatever shares the visits, a request's tokens, depths and log-probabilities are those of the model alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.engine.engine import Engine, choose_num_pages, end_tokens
from mor.engine.options import EngineOptions
from mor.engine.params import SamplingParams
from mor.model.calibrate import calibrate
from mor.model.decision import Threshold
from mor.model.expert_choice import FixedDepths
from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import Router
from mor.model.token_choice import DepthRule
from tests.engine.workload import (
    TOKENIZER,
    Job,
    Story,
    check_against_forward,
    check_against_generate,
    check_all_free,
    check_tokens,
    drain,
    engine_of,
    greedy,
    play,
    random_tokens,
    tight_pool,
)
from tests.tiny import BUDGET_ROUTERS, KV_CACHES, architectures, label, random_ids, tiny_config, tiny_model

OTHER_HEADS: list[dict[str, Any]] = [
    dict(router="expert_choice", causal_method="aux_router", kv_cache="recursion"),
    dict(router="expert_choice", causal_method="aux_router", router_architecture="mlp", kv_cache="hybrid"),
    dict(router="expert_choice", router_architecture="mlp", sharing="cycle"),
    dict(router="expert_choice", gating="additive", capacities=[0.8, 0.6, 0.4], kv_cache="shared"),
    dict(router="token_choice", router_architecture="mlp", kv_cache="hybrid"),
    dict(router="token_choice", balancing="loss_free", gating="additive"),
]
ALL_MODELS = [*architectures(), *OTHER_HEADS]


def options(draw: random.Random, **settings: Any) -> dict[str, Any]:
    return dict(
        max_requests=draw.choice([4, 8]),
        max_visit_tokens=draw.choice([4, 16, 64]),
        prefill_chunk=draw.choice([3, 8, 32]),
        **settings,
    )


def alike(draw: random.Random) -> list[Job]:
    """Prompts with a common beginning; all but the first come when it has ended, one is aborted."""
    stem = random_tokens(draw, 40)
    jobs = [Job(name="stem", prompt=(*stem, *random_tokens(draw, 2)), params=greedy(2))]
    for number in range(4):
        prompt = (*stem[: draw.randrange(33, 40)], *random_tokens(draw, draw.randrange(1, 5)))
        params, at = greedy(draw.randrange(1, 6)), draw.randrange(150, 160)
        jobs.append(Job(name=f"{number}", prompt=prompt, params=params, at=at, abort_at=165 if number == 3 else None))
    return jobs


def crowd(draw: random.Random) -> list[Job]:
    """Short prompts and longer outputs at about the same time; one is aborted."""
    return [
        Job(
            name=f"crowd-{number}",
            prompt=random_tokens(draw, draw.randrange(1, 7)),
            params=greedy(draw.randrange(8, 12)),
            at=draw.randrange(3),
            abort_at=draw.randrange(8, 20) if number == 5 else None,
        )
        for number in range(6)
    ]


# the same function


@pytest.mark.parametrize("architecture", ALL_MODELS, ids=[label({k: str(v) for k, v in a.items()}) for a in ALL_MODELS])
def test_greedy_output_is_the_models(architecture: dict[str, Any]) -> None:
    """Arrivals, aborts, prefixes from other requests, preemptions; chunks and pages of several sizes."""
    draw = random.Random(ALL_MODELS.index(architecture))
    model = tiny_model(**architecture)
    engine = engine_of(model, **options(draw, page_entries=draw.choice([1, 2, 4, 8]), num_pages=900))
    sharing = play(engine, alike(draw))
    assert all(sharing[name].last.cached_tokens == 32 for name in "012")  # type: ignore[union-attr]

    jobs, settings = crowd(draw), options(draw, page_entries=draw.choice([1, 2]))
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=0), **settings)
    crowded = play(engine, jobs)
    assert engine.statistics.preemptions > 0

    check_against_forward(model, [*sharing.values(), *crowded.values()])
    check_against_generate(model, [story for story in crowded.values() if story.tokens][:4])


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("router", BUDGET_ROUTERS)
def test_each_request_has_its_own_mean_depth(router: str, kv_cache: str) -> None:
    """Several budgets in the same visits, with a pool that makes them start again."""
    draw = random.Random(1)
    model = calibrated(router, kv_cache=kv_cache)
    budgets = [None, 1.0, 1.4, 2.0, 2.7, 3.0]
    jobs = [
        Job(name=f"{mean_depth}", prompt=random_tokens(draw, 9), params=greedy(8, mean_depth=mean_depth))
        for mean_depth in budgets
    ]
    settings = dict(page_entries=2, max_visit_tokens=16, prefill_chunk=4)
    engine = engine_of(model, num_pages=tight_pool(settings, model, jobs, spare=8), **settings)
    stories = play(engine, jobs)
    assert engine.statistics.preemptions > 0
    check_against_forward(model, stories.values())
    for story in stories.values():
        check_against_generate(model, [story], story.job.params.mean_depth)
    assert {token.depth for token in stories["1.0"].tokens} == {1}
    assert {token.depth for token in stories["3.0"].tokens} == {3}
    spent = {name: story.last.mean_depth for name, story in stories.items() if story.last}
    assert spent["1.4"] < spent["2.7"]  # type: ignore[operator]


def test_prefixes_are_not_shared_between_budgets() -> None:
    draw, model = random.Random(0), calibrated("expert_choice")
    stem = random_tokens(draw, 36)
    budgets = [2.0, 2.0, 1.2, None, 2.0]
    jobs = [
        Job(name=f"{number}", prompt=(*stem, number + 1), params=greedy(3, mean_depth=budget), at=30 * number)
        for number, budget in enumerate(budgets)
    ]
    stories = play(engine_of(model), jobs)
    cached = [story.last.cached_tokens for story in stories.values() if story.last]
    assert cached == [0, 32, 0, 0, 32]
    check_against_forward(model, stories.values())


def calibrated(router: str, **changes: Any) -> MorForCausalLM:
    model = tiny_model(router=router, **changes)
    calibrate(model, [random_ids(8, 40, seed=5)], mean_depths=[1, 1.5, 2, 2.5, 3])
    return model


# the limit of recursions


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("router", ["none", "expert_choice", "threshold_choice", "token_choice", "random", "fixed"])
def test_no_token_takes_more_than_its_limit(router: str, kv_cache: str) -> None:
    """Limits of 1, 2, all and none in the same visits. With all recursions it is as if there were none."""
    draw = random.Random(2)
    model = tiny_model(router=router, kv_cache=kv_cache, sharing="middle_cycle")
    prompt = random_tokens(draw, 11)
    jobs = [Job(name=f"{most}", prompt=prompt, params=greedy(8, max_recursions=most)) for most in (1, 2, 3, None)]
    stories = play(engine_of(model, prefill_chunk=5), jobs)
    for most in (1, 2, 3):
        story = stories[f"{most}"]
        assert max(token.depth for token in story.tokens) <= most
        limited, rule = limit_recursions(model, most)
        check_under(limited, rule, story)
    assert stories["3"].ids == stories["None"].ids
    check_against_forward(model, [stories["3"], stories["None"]])


@pytest.mark.parametrize("router", BUDGET_ROUTERS)
def test_a_limit_and_a_mean_depth_together(router: str) -> None:
    model, prompt = calibrated(router), random_tokens(random.Random(3), 9)
    jobs = [
        Job(name=f"{depth}", prompt=prompt, params=greedy(6, mean_depth=depth, max_recursions=2))
        for depth in (1.0, 1.8, 3.0)
    ]
    stories = play(engine_of(model), jobs)
    assert {token.depth for token in stories["1.0"].tokens} == {1}
    assert {token.depth for token in stories["1.8"].tokens} <= {1, 2}
    assert {token.depth for token in stories["3.0"].tokens} == {2}
    for depth, story in stories.items():
        limited, rule = limit_recursions(model, 2, float(depth))
        if router != "token_choice" or depth != "3.0":  # there the full forward has no rule that says this
            check_under(limited, rule, story)


def limit_recursions(model: MorForCausalLM, most: int, mean_depth: float | None = None) -> tuple[MorForCausalLM, Any]:
    """A model and a decision rule whose full forward stops tokens after `most` recursions."""
    router = model.model.recursion.router
    if router is None:
        plan = model.config.depth_plan
        size = 2 * plan.num_outer + most * plan.block_size
        changes = dict(sharing=plan.sharing, kv_cache=model.config.kv_cache, num_recursions=most)
        shallow = MorForCausalLM(tiny_config(num_hidden_layers=size, **changes)).eval()
        shallow.load_state_dict(model.state_dict())
        return shallow, None
    return model, limited_rule(router, most, mean_depth)


def limited_rule(router: Router, most: int, mean_depth: float | None) -> Any:
    rule = router.rule("causal", mean_depth)
    if isinstance(rule, Threshold):
        beyond = torch.arange(3) >= most
        return Threshold(thresholds=rule.thresholds.masked_fill(beyond, torch.inf))
    if isinstance(rule, DepthRule):
        bias = torch.zeros(3) if rule.bias is None else rule.bias
        return DepthRule(bias=bias.masked_fill(torch.arange(3) >= most, -torch.inf))
    assert isinstance(rule, FixedDepths)
    return FixedDepths(depths=[min(depth, most) for depth in rule.depths])


def check_under(model: MorForCausalLM, rule: Any, story: Story) -> None:
    start = len(story.job.prompt) - 1
    with torch.no_grad():
        full = model(torch.tensor([[*story.job.prompt, *story.ids]]), decision=rule)
    check_tokens(story.tokens, full.logits[0, start:-1], full.depths[0, start:-1])


# streams, and generating at once


def test_streamed_outputs_are_generates() -> None:
    draw, model = random.Random(4), tiny_model(router="expert_choice")
    jobs = [
        Job(name=f"{number}", prompt=random_tokens(draw, 5), params=SamplingParams(seed=number, max_tokens=12))
        for number in range(4)
    ]
    stories = play(engine_of(model), jobs)
    whole = engine_of(model).generate([job.prompt for job in jobs], [job.params for job in jobs], progress=False)
    assert [tuple(stories[job.name].tokens) for job in jobs] == [output.tokens for output in whole]
    assert [stories[job.name].text for job in jobs] == [output.text for output in whole]
    for output in whole:
        assert output.finished and output.error is None and output.prompt_tokens == 5
        assert [token.offset for token in output.tokens] == offsets([token.text for token in output.tokens])
        assert output.mean_depth == sum(token.depth for token in output.tokens) / len(output.tokens)


def offsets(texts: list[str]) -> list[int]:
    return [sum(map(len, texts[:number])) for number in range(len(texts))]


def test_outputs_come_while_others_run() -> None:
    engine = engine_of(tiny_model())
    assert engine.add_request("short", [1, 2], greedy(1)) == ["short"]
    assert engine.add_request("long", [3, 4], greedy(3)) == ["long"]
    heard = [[(output.id, output.finished) for output in engine.step()] for _ in range(3)]
    assert heard == [[("short", True), ("long", False)], [("long", False)], [("long", True)]]
    assert not engine.has_unfinished and engine.step() == []


def test_generate_keeps_the_order_of_the_prompts() -> None:
    engine = engine_of(tiny_model(), max_requests=1)
    params = [SamplingParams(max_tokens=4, seed=1, n=2), greedy(1), greedy(3)]
    outputs = engine.generate([[1, 2], [3], [4, 5, 6]], params, progress=True)
    assert [output.id for output in outputs] == ["prompt-0-0", "prompt-0-1", "prompt-1", "prompt-2"]
    assert [len(output.tokens) for output in outputs][2:] == [1, 3]
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        engine.generate([[1]], [greedy(1), greedy(1)])
    check_all_free(engine)


def test_a_prompt_may_be_text(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=300, router="token_choice")
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, device="cpu", options=EngineOptions(num_pages=200))
    [text] = engine.generate(["read me"], greedy(5), progress=False)
    [ids] = engine.generate([list(b"read me")], greedy(5), progress=False)
    assert text.tokens == ids.tokens and text.prompt_tokens == 7


def test_statistics_count() -> None:
    engine = engine_of(tiny_model(router="gate"), prefix_caching=False)
    engine.generate([[1, 2, 3], [4]], greedy(2), progress=False)
    assert (engine.statistics.tokens, engine.statistics.preemptions) == (4, 0)
    assert engine.statistics.visits == 6 and engine.statistics.rows == 3 * (4 + 2)


# what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty prompt"),
        ("", {}, "empty prompt"),
        ([1, 64], {}, r"token 64, which is outside the vocabulary 0..63"),
        ([-1], {}, "token -1"),
        ([1.7], {}, r"the prompt \[1.7\] must be a text or a sequence of token ids"),
        (5, {}, "the prompt 5 must be a text or a sequence"),
        ("caf\ud800", {}, r"half of a character, '\\ud800' at 3"),
        ([1] * 30, {}, "max_length=30 leaves room for at most 29"),
        ([1] * 20, dict(max_tokens=9), "num_pages=20; lower max_tokens to"),
        ([1], dict(mean_depth=1.5), "mean_depth=1.5 needs a calibrated model"),
        ([1], dict(stop_token_ids=(3, 64)), r"^stop_token_ids=\(3, 64\) has 64, outside the vocabulary 0..63"),
        ([1], dict(max_recursions=4), "max_recursions=4 must be between 1 and the model's 3"),
        ([1], dict(n=3), "'busy-1' is already being generated"),
    ],
)
def test_what_is_refused_disturbs_nobody(prompt: Any, params: dict[str, Any], message: str) -> None:
    engine = engine_of(tiny_model(router="expert_choice"), max_length=30, num_pages=20)
    engine.add_request("busy-1", [1, 2, 3], SamplingParams(max_tokens=4))
    engine.step()
    pages = engine.pool.num_free
    with pytest.raises(ValueError, match=message):
        engine.add_request("busy", prompt, SamplingParams(**{"max_tokens": 4, **params}))
    assert engine.pool.num_free == pages
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 0)
    tokens = [token for output in drain(engine) for token in output.tokens]
    again = engine_of(tiny_model(router="expert_choice"))
    [alone] = again.generate([[1, 2, 3]], SamplingParams(max_tokens=4), progress=False)
    assert tokens == list(alone.tokens)
    check_all_free(engine)


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        (dict(router="none"), dict(mean_depth=1.0), "mean_depth=1.0 needs a router"),
        (dict(router="fixed"), dict(mean_depth=2.0), "fixed depth"),
        (dict(router="none", sharing="sequence"), dict(max_recursions=1), "layers repeat in place"),
    ],
)
def test_budgets_that_a_model_does_not_have(model: Any, params: Any, message: str) -> None:
    engine = engine_of(tiny_model(**model))
    with pytest.raises(ValueError, match=message):
        engine.add_request("0", [1], SamplingParams(**params))
    assert not engine.has_unfinished


def test_a_mean_depth_out_of_reach() -> None:
    engine = engine_of(calibrated("expert_choice"))
    with pytest.raises(ValueError, match=r"mean_depth=3.5 is impossible: this model can do 1.000 to 3.000"):
        engine.add_request("0", [1], SamplingParams(mean_depth=3.5))


def test_a_single_text_is_not_taken_for_a_list_of_prompts() -> None:
    with pytest.raises(ValueError, match=r"prompts='Hi' is a single text; write \[prompt\]"):
        engine_of(tiny_model()).generate("Hi", greedy(2), progress=False)


def test_a_bad_prompt_among_many_leaves_nothing_queued() -> None:
    engine = engine_of(tiny_model())
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([[1], [2], []], greedy(2), progress=False)
    check_all_free(engine)


def test_what_is_refused_draws_no_seed() -> None:
    """Requests without a seed get theirs in the order in which they are accepted."""
    outputs = []
    for refused in (0, 2):
        engine = engine_of(tiny_model())
        for _ in range(refused):
            with pytest.raises(ValueError, match="empty prompt"):
                engine.add_request("bad", [])
        outputs += engine.generate([[1, 2]], SamplingParams(max_tokens=8), progress=False)
    assert outputs[0].tokens == outputs[1].tokens


# memory, and the end of a text


def test_the_pool_is_as_large_as_its_memory() -> None:
    cpu = torch.device("cpu")
    assert choose_num_pages(EngineOptions(num_pages=7), 2**20, cpu) == 7
    assert choose_num_pages(EngineOptions(kv_memory_gib=0.5), 2**20, cpu) == 512
    assert choose_num_pages(EngineOptions(), 2**20, cpu) == 1024
    with pytest.raises(ValueError, match=r"1.0 MiB hold no page of 2.0 MiB; raise kv_memory_gib"):
        choose_num_pages(EngineOptions(kv_memory_gib=2**-10), 2**21, cpu)


def test_max_length_is_at_most_the_models() -> None:
    with pytest.raises(ValueError, match="max_length=257 exceeds the model's max_position_embeddings=256"):
        engine_of(tiny_model(), max_length=257)
    assert engine_of(tiny_model()).scheduler.limits.max_length == 256


def test_which_tokens_end_a_text() -> None:
    model = tiny_model()
    assert end_tokens(model, TOKENIZER) == {0}
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [3, 5]
    assert end_tokens(model, TOKENIZER) == {3, 5}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, TOKENIZER) == {256}
    assert end_tokens(model, object()) == frozenset()
