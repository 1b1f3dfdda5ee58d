"""Whether the sets of a router that decides their sizes are padded in training.

Padded, a recursion computes all tokens, most for nothing, but no shape depends on a decision, so that a whole step can
be a CUDA graph (`mor.train.step_graph`). Unpadded, a step launches its kernels one by one and computes little more than
it needs. What is learnt is the same.
"""

from __future__ import annotations

from collections.abc import Callable

from mor.model.configuration_mor import MorConfig
from mor.model.cost import TRAINING_FACTOR, complete_flops
from mor.model.modeling_mor import MorForCausalLM
from mor.train.options import TrainingOptions

VARYING_ROUTERS = ("token_choice", "threshold_choice")  # scores decide how many tokens take a recursion
LAUNCH_SECONDS = 2e-3  # of a layer application and its backward pass in Python: measured 3 on an H200's host
UTILISATION = 0.25  # of a device's matrix products, that narrow layers reach


def has_padded_sets(model: MorForCausalLM) -> bool:
    """Whether a model's router pads its sets in training."""
    router = model.model.recursion.router
    return router is not None and router.pads_sets


def should_pad(training: TrainingOptions, config: MorConfig, ceiling: Callable[[], float]) -> bool:
    """Whether to pad where a graph can be had; `ceiling`: FLOP/s of the device on large matrix products.

    When a graph is asked for; when nothing is said, if the padded work takes less time than launching it.
    """
    if config.router not in VARYING_ROUTERS or training.cuda_graph is False:
        return False
    return bool(training.cuda_graph) or padded_seconds(training, config, ceiling()) < launch_seconds(config)


def padded_seconds(training: TrainingOptions, config: MorConfig, ceiling: float) -> float:
    """Time that a micro-batch's matrix products take when every token takes every recursion."""
    tokens = training.sequence_length
    flops = training.micro_batch_size * complete_flops(config, tokens, active=[tokens] * config.num_recursions)
    return TRAINING_FACTOR * flops / (UTILISATION * ceiling)


def launch_seconds(config: MorConfig) -> float:
    """Time that the host takes to launch a micro-batch's kernels one by one."""
    return config.depth_plan.num_layers * LAUNCH_SECONDS
