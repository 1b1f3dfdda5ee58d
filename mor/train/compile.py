"""Compiling a model for training: the arithmetic of its layers, and nothing that decides.

A layer's code before and after attention is compiled once per number of active tokens and reused by all layers.
Routing, gathering and the choice of keys and values stay in Python: they launch few kernels and never wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mor.model.configuration_mor import MorConfig
from mor.model.layers import MorDecoderLayer
from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import ScoreHead

COMPILED: dict[type[nn.Module], tuple[str, ...]] = {
    MorDecoderLayer: ("before_attention", "queries_alone", "after_attention"),
    ScoreHead: ("forward",),
}


def compile_layers(model: MorForCausalLM) -> None:
    """Let the layers of a model in training mode run compiled, without graph breaks.

    Evaluation runs as before: its sets of tokens differ from batch to batch. Where training's do so too, the code is
    compiled for any number of tokens.
    """
    dynamic = has_varying_sets(model.config)
    for module in model.modules():
        for name in COMPILED.get(type(module), ()):
            setattr(module, name, _in_training(module, getattr(module, name), dynamic))


def has_varying_sets(config: MorConfig) -> bool:
    """Whether the number of tokens at a recursion changes from one training step to the next."""
    return config.router == "token_choice" or config.capacity_warmup_steps > 0


def _in_training(module: nn.Module, plain: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    compiled = torch.compile(plain, fullgraph=True, dynamic=dynamic)

    def call(*args: Any) -> Any:
        return (compiled if module.training else plain)(*args)

    return call
