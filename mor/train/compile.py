"""Compiling a model for training: the arithmetic of its layers, and nothing that decides.

A layer's code before and after attention is compiled once per shape and reused by all layers and recursions. Routing,
gathering and the choice of keys and values stay in Python: they launch few kernels and never wait for the device.
"""

from __future__ import annotations

import torch

from mor.model.layers import MorDecoderLayer
from mor.model.modeling_mor import MorForCausalLM

COMPILED = ("before_attention", "queries_alone", "after_attention")


def compile_layers(model: MorForCausalLM, *, dynamic: bool | None = None) -> None:
    """Replace the layers' tensor arithmetic by compiled code, without graph breaks.

    `dynamic`: compile for any number of active tokens, for routers whose numbers change from step to step.
    """
    for layer in model.modules():
        if isinstance(layer, MorDecoderLayer):
            for name in COMPILED:
                plain = getattr(type(layer), name).__get__(layer)
                setattr(layer, name, torch.compile(plain, fullgraph=True, dynamic=dynamic))
