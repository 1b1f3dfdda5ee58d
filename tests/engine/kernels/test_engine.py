"""The whole engine on the kernels, in slots and in planned visits: what the model's own forward gives."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

import pytest
import torch

from mor.engine import engine as engine_module
from tests.engine.workload import Job, check_against_forward, engine_of, greedy, play, random_tokens
from tests.tiny import tiny_model

ARCHITECTURES: list[dict[str, Any]] = [
    dict(num_recursions=1, sharing="none", num_hidden_layers=3),
    dict(router="expert_choice", num_hidden_layers=5),
    dict(router="token_choice", kv_cache="shared", num_hidden_layers=5),
    dict(router="expert_choice", kv_cache="hybrid", num_hidden_layers=5),
]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engine/test_cuda.py runs the kernels themselves")
@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_output_is_the_models(
    monkeypatch: pytest.MonkeyPatch, architecture: dict[str, Any], slots: bool
) -> None:
    kernels = import_module("mor.engine.kernels.ops")
    monkeypatch.setattr(engine_module, "ops_for", lambda device, head_size: kernels)
    settings = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48)
    model, draw = tiny_model(**{**settings, "sharing": "middle_cycle", **architecture}), random.Random(0)
    jobs = [
        Job(name=f"{n}", prompt=random_tokens(draw, draw.randrange(1, 9)), params=greedy(4), at=n // 2)
        for n in range(4)
    ]
    engine = engine_of(model, slots=slots, slot_visits=2, prefill_chunk=5)
    assert (engine.slots is not None) == slots
    check_against_forward(model, play(engine, jobs).values())
