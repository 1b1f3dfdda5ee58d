"""The engine on a GPU: kernels, graphs and batches of visits give what the model's own forward gives."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mor.engine.engine import Engine
from mor.engine.options import EngineOptions
from mor.engine.params import SamplingParams
from mor.engine.request import Segment, SegmentResult
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from tests.engine.workload import TOKENIZER, Job, check_against_forward, greedy, play, random_tokens
from tests.tiny import VOCABULARY

pytestmark = pytest.mark.gpu

ARCHITECTURES: list[dict[str, Any]] = [
    dict(num_recursions=1, sharing="none"),
    dict(router="expert_choice"),
    dict(router="token_choice", kv_cache="shared"),
    dict(router="expert_choice", kv_cache="hybrid"),
]


def cuda_model(dtype: torch.dtype, **changes: Any) -> MorForCausalLM:
    """A small model with heads of a size that the kernels read."""
    settings: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_recursions=3,
        sharing="middle_cycle",
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return MorForCausalLM(MorConfig(**{**settings, **changes})).eval().to(device="cuda", dtype=dtype)


def engine_of(model: MorForCausalLM, **settings: Any) -> Engine:
    options = EngineOptions(**{"num_pages": 2000, "max_requests": 24, "prefill_chunk": 32, **settings})
    engine = Engine(model, TOKENIZER, options)
    assert engine.slots is not None
    return engine


def jobs(seed: int, count: int) -> list[Job]:
    draw = random.Random(seed)
    stem = random_tokens(draw, 70)
    return [
        Job(
            name=f"{number}",
            prompt=(*stem[: draw.choice([0, 0, 40, 70])], *random_tokens(draw, draw.randrange(1, 40))),
            params=greedy(draw.randrange(1, 40)),
            at=draw.randrange(12),
            abort_at=15 if number % 7 == 6 else None,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float32_tokens_depths_and_log_probabilities_are_the_models(architecture: dict[str, Any]) -> None:
    """On a copy of the model on a CPU: different kernels, the same function. Preemptions and prefixes on the way."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = cuda_model(torch.float32, **architecture)
    engine = engine_of(model, num_pages=260)
    stories = play(engine, jobs(0, 40))
    assert any(story.last and story.last.cached_tokens for story in stories.values())
    check_against_forward(model.cpu(), stories.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_log_probabilities_are_the_models_within_rounding(architecture: dict[str, Any]) -> None:
    """And every token is, within as much, the most probable one."""
    model = cuda_model(torch.bfloat16, **architecture)
    stories = play(engine_of(model), jobs(1, 40))
    for story in (story for story in stories.values() if story.tokens):
        ids = torch.tensor([[*story.job.prompt, *story.ids]], device="cuda")
        with torch.no_grad():
            full = model(ids)
        start = len(story.job.prompt) - 1
        logits = full.logits[0, start:-1].float()
        depths = full.depths[0, start:-1].tolist()
        same = [n for n, token in enumerate(story.tokens) if token.depth == depths[n]]
        assert len(same) >= 0.9 * len(story.tokens), "rounding decides few depths"
        expected = logits.log_softmax(-1)
        for n in same:
            token = story.tokens[n]
            assert token.logprob is not None
            assert abs(token.logprob - float(expected[n, token.token])) < 0.25
            assert float(expected[n].max() - expected[n, token.token]) < 0.25


@pytest.mark.parametrize(("router", "most"), [("none", 0), ("expert_choice", 4)])
def test_prompts_wait_for_the_device_only_to_learn_which_tokens_go_on(
    monkeypatch: pytest.MonkeyPatch, router: str, most: int
) -> None:
    """How many and which, where they enter and after each recursion; not for copies."""
    engine, draw, waits = engine_of(cuda_model(torch.bfloat16, router=router)), random.Random(2), list[int]()
    visit = engine.runner.visit

    def watched(segments: Sequence[Segment]) -> list[SegmentResult]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return visit(segments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchronizing" in str(warning.message) for warning in caught))

    for _ in range(2):  # the first time compiles
        waits.clear()
        monkeypatch.setattr(engine.runner, "visit", watched)
        engine.generate([random_tokens(draw, 20) for _ in range(6)], greedy(8), progress=False)
    assert len(waits) >= 3 and max(waits) <= most


def test_what_else_is_in_the_slots_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With visits of one shape, and prompts of one token, which need no visit beside them."""
    monkeypatch.setattr("mor.engine.slot_runner.SIZES", (24,))
    monkeypatch.setattr("mor.engine.slot_runner._TurnRate.places", lambda rate, slots: slots)
    model = cuda_model(torch.bfloat16, router="expert_choice")
    params = SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True, logprobs=0)
    crowd = engine_of(model).generate([[number + 1] for number in range(24)], params, progress=False)
    for number in (0, 5, 23):
        [alone] = engine_of(model).generate([[number + 1]], params, progress=False)
        assert alone.tokens == crowd[number].tokens
