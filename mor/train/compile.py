"""Compiling a model for training: the arithmetic of its layers, and nothing that decides.

A layer's code before and after attention is compiled once per number of active tokens and reused by all layers.
Routing, gathering and the choice of keys and values stay in Python: they launch few kernels and never wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._dynamo.utils
import torch._functorch.config as partitioning
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from mor.model.backbone import MorModel
from mor.model.configuration_mor import MorConfig
from mor.model.layers import MorDecoderLayer
from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import RecursionRouter
from mor.model.token_choice import TokenChoiceRouter
from mor.train.padded_sets import VARYING_ROUTERS, has_padded_sets

COMPILED: dict[type[nn.Module], tuple[str, ...]] = {
    MorModel: ("normed",),
    MorDecoderLayer: ("before_attention", "queries_alone", "after_attention"),
    RecursionRouter: ("read", "advance"),
    TokenChoiceRouter: ("read",),
}
NUMBERS_OF_TOKENS = 64  # that one function may be compiled for in a process, which may train several models
# What the layers around keep anyway is all that these need to run again in the backward pass.
RECOMPUTED = ("advance",)


class _Kept:
    """What this process has compiled. `serves_any`: some of it is for any number of tokens."""

    serves_any = False


def compile_layers(model: MorForCausalLM) -> None:
    """Let the layers of a model in training mode run compiled, without graph breaks.

    Evaluation runs as before: its sets of tokens differ from batch to batch. Where training's do so too, the code is
    compiled for any number of tokens.
    """
    dynamic = has_varying_sets(model.config) and not has_padded_sets(model)
    dynamo.recompile_limit = max(dynamo.recompile_limit, NUMBERS_OF_TOKENS)
    _Kept.serves_any |= dynamic
    for module in model.modules():
        for kind, names in COMPILED.items():
            for name in names if isinstance(module, kind) else ():
                setattr(module, name, _in_training(module, name, dynamic))


def forget_compiled() -> None:
    """Forget compiled code after a run in a process that trains several.

    It stays where the next run may use it. Code for any number of tokens goes: it would serve a run of a fixed number
    too, and is slower. So does much code, as there is a limit to what one function may be compiled for.
    """
    stats = torch._dynamo.utils.counters["stats"]
    if _Kept.serves_any or stats["unique_graphs"] > NUMBERS_OF_TOKENS // 2:
        torch.compiler.reset()
        stats.clear()
        _Kept.serves_any = False


def has_varying_sets(config: MorConfig) -> bool:
    """Whether the number of tokens at a recursion changes from one training step to the next, unless it is padded."""
    return config.router in VARYING_ROUTERS or config.capacity_warmup_steps > 0


def _in_training(module: nn.Module, name: str, dynamic: bool) -> Callable[..., Any]:
    plain = trained = getattr(module, name)
    if name in RECOMPUTED:
        trained = partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)
    compiled = torch.compile(trained, fullgraph=True, dynamic=dynamic, backend=_compile_sparing)

    def call(*args: Any) -> Any:
        return (compiled if module.training else plain)(*args)

    return call


def _compile_sparing(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """Inductor, told to compute element-wise results again in the backward pass even where a product then reads them.

    Normed inputs and the feed-forward's gated values are nearly a third of a layer's activations, and cost one more
    write.
    """
    from torch._inductor.compile_fx import compile_fx  # loads the compiler, which only training on CUDA needs

    with partitioning.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)  # type: ignore[return-value]
