"""Small models for the tests of evaluation, with routers that disagree about their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor.model.calibrate import calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM

VOCABULARY = 32


def model(router: str = "expert_choice", **options: Any) -> MorForCausalLM:
    """A random model of eight layers: three recursions of two, or for `router="vanilla"` eight of their own."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    if router != "vanilla":
        shape |= {"num_recursions": 3, "sharing": "middle_cycle", "router": router}
    built = MorForCausalLM(MorConfig(**shape | options)).eval()
    if router == "threshold_choice":
        built.model.recursion.router.running_thresholds.zero_()  # as if training had moved them
    return built


def calibrated(router: str = "expert_choice", **options: Any) -> MorForCausalLM:
    """The same, with thresholds for every budget."""
    built = model(router, **options)
    calibrate(built, [rows(16, 32)])
    return built


def rows(batch: int, length: int, *, seed: int = 1) -> Tensor:
    """Random tokens (batch, length)."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
