"""Training steps of MoR, its twins and transformers' Llama, side by side on one CUDA device.

    python -m bench.train_step [--arms vanilla,mor-2,...] [--size 360m] [--rows 16] [--steps 20] [--rounds 2]

360M dimensions or those of the studies, bfloat16 over float32 weights, random tokens, forward + backward + clipping +
AdamW. Every arm runs in each round, so that ratios are of one run and their spread is seen. An arm of ours whose name
ends in `-captured` replays its steps as a CUDA graph, with padded sets where sets vary; the others run kernel by
kernel. Fails on graph breaks, on recompilations after the warm-up and on host synchronisations. Prints a table, and one
line of JSON last. What small models gain from graphs:

    python -m bench.train_step --size 6m --rows 32 --length 512 --steps 100 --rounds 1 \
        --arms vanilla,vanilla-captured,mor-3,mor-3-captured,mor-3-token,mor-3-token-captured
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.clock import matmul_rate
from mor.data.loader import Batch
from mor.model.configuration_mor import MorConfig
from mor.model.cost import training_flops
from mor.model.modeling_mor import MorForCausalLM
from mor.model.threshold_choice import MeasuredThreshold
from mor.model.token_choice import DepthRule
from mor.study.studies import WIDTHS, vanilla
from mor.train.compile import compile_layers
from mor.train.fused_loss import ChunkedLmLoss
from mor.train.optim import build_optimizer
from mor.train.options import OptimizerOptions
from mor.train.padded_sets import VARYING_ROUTERS
from mor.train.step import DeviceStep, Run
from mor.train.step_graph import CudaCapture, StepGraph
from mor.train.window import Window

SIZES: dict[str, dict[str, Any]] = {
    "360m": dict(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "6m": vanilla(WIDTHS["6m"], 8192),
}
CAPTURED = "-captured"
MIDDLE = dict(sharing="middle_cycle")
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "recursive-2": MIDDLE | dict(num_recursions=2),
    "mor-2": MIDDLE | dict(num_recursions=2, router="expert_choice"),
    "mor-3": MIDDLE | dict(num_recursions=3, router="expert_choice"),
    "mor-3-shared": MIDDLE | dict(num_recursions=3, router="expert_choice", kv_cache="shared"),
    "mor-3-threshold": MIDDLE | dict(num_recursions=3, router="threshold_choice"),
    "mor-3-token": MIDDLE | dict(num_recursions=3, router="token_choice"),
    "vanilla-documents": {},
    "mor-3-documents": MIDDLE | dict(num_recursions=3, router="expert_choice"),
    "transformers": {},
}
DOCUMENT_TOKENS = 500  # on average, in the arms whose attention stays inside documents


@dataclass(kw_only=True)
class Measured:
    """One arm in one round: median seconds of a step, peak memory in bytes, seconds of the warm-up, last loss."""

    seconds: float
    peak_bytes: int
    warmup_seconds: float
    loss: float


class BalancedDepths(DepthRule):
    """Every depth for a third of the tokens, at random: token-choice's cost at balanced load, whatever its router."""

    def depth(self, score_BTR: Tensor, valid_BT: Tensor | None) -> Tensor:
        return torch.randint(score_BTR.shape[-1], score_BTR.shape[:2], device=score_BTR.device)


class BalancedThresholds(MeasuredThreshold):
    """The capacities' shares of all tokens, at random: threshold-choice's cost, whatever its router."""

    def keeps(self, recursion: int, score_BA: Tensor, valid_BA: Tensor | None) -> Tensor:
        before = self.capacities[recursion - 1] if recursion else 1.0
        keep_BA = torch.rand_like(score_BA) < self.capacities[recursion] / before
        return keep_BA if valid_BA is None else keep_BA & valid_BA


def dimensions(size: str, length: int) -> dict[str, Any]:
    """What all arms share."""
    return SIZES[size] | {"max_position_embeddings": length}


def config_of(name: str, size: str, length: int) -> MorConfig:
    """The model of an arm."""
    own = ARMS[name.removesuffix(CAPTURED)]
    return MorConfig(**dimensions(size, length), **own)


def mor_step(name: str, size: str, rows: Tensor) -> Callable[[], Tensor]:
    """A training step of one of our models, as `mor train` takes it."""
    config = config_of(name, size, rows.shape[1])
    model: Any = MorForCausalLM(config)
    model = model.cuda().train()
    router = model.model.recursion.router
    if config.router == "token_choice":
        router.trained_rule = BalancedDepths
    if config.router == "threshold_choice":
        thresholds, capacities = router.running_thresholds, router.trained_shares
        router.trained_rule = partial(BalancedThresholds, thresholds=thresholds, capacities=capacities)
    if config.router in VARYING_ROUTERS:
        router.pads_sets = name.endswith(CAPTURED)
    compile_layers(model)
    run: Run = DeviceStep(
        model=model, optimizer=build_optimizer(model, OptimizerOptions()), dtype=torch.bfloat16, lm_loss=ChunkedLmLoss()
    )
    if name.endswith(CAPTURED):
        run = StepGraph(run, CudaCapture(model.device), tell=print)
    window = Window(config)
    documents = (torch.rand(rows.shape, device="cuda") < 1 / DOCUMENT_TOKENS).cumsum(1)
    masked = name.removesuffix(CAPTURED).endswith("-documents")
    batch = Batch(input_ids=rows, document_ids=documents if masked else None, epoch=0)

    def step() -> Tensor:
        window.clear()
        run([batch], window)
        return window.state_dict()["values/loss"][0]

    return step


def transformers_step(size: str, rows: Tensor) -> Callable[[], Tensor]:
    """A training step of transformers' Llama under torch.compile and autocast: the peer."""
    config = LlamaConfig(**dimensions(size, rows.shape[1]), tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    model = model.cuda().train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(name: str, size: str, rows: Tensor, steps: int) -> Measured:
    """Build an arm, warm it up, time its steps with device events, and drop it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    step = transformers_step(size, rows) if name == "transformers" else mor_step(name, size, rows)
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    warmup = time.perf_counter() - start
    compiled = _compilations()
    torch.cuda.reset_peak_memory_stats()
    ours = name != "transformers"
    torch.cuda.set_sync_debug_mode("error" if ours else "default")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step()
        event.record()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    if ours and (_compilations() != compiled or torch._dynamo.utils.counters["graph_break"]):
        raise RuntimeError(f"{name}: compiled again or broke the graph: {compiled} -> {_compilations()}")
    seconds = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
    measured = Measured(
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(),
        warmup_seconds=warmup,
        loss=loss.item(),
    )
    del step
    gc.collect()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.cuda.empty_cache()
    return measured


def _compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def flops_per_step(name: str, size: str, rows: Tensor) -> float:
    """Training FLOPs of a step by the complete rule."""
    config = config_of(name, size, rows.shape[1])
    return training_flops(config, rows.numel(), sequence_length=rows.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--size", choices=SIZES, default="360m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    rows = torch.randint(SIZES[arguments.size]["vocab_size"], (arguments.rows, arguments.length), device="cuda")
    ceiling = matmul_rate("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; matmul ceiling {ceiling / 1e12:.0f} TFLOP/s")
    results: dict[str, list[Measured]] = {name: [] for name in arguments.arms.split(",")}
    for number in range(arguments.rounds):
        for name, measured in results.items():
            measured.append(measure(name, arguments.size, rows, arguments.steps))
            print(f"round {number + 1} {name}: {measured[-1]}", flush=True)
    print_table(results, arguments.size, rows, ceiling)


def print_table(results: dict[str, list[Measured]], size: str, rows: Tensor, ceiling: float) -> None:
    """Medians over rounds, ratios to the vanilla arm, spread of the ratios; then JSON."""
    lines = []
    base = results.get("vanilla") or next(iter(results.values()))
    for name, measured in results.items():
        seconds = statistics.median(m.seconds for m in measured)
        ratios = [m.seconds / b.seconds for m, b in zip(measured, base, strict=True)]
        lines.append(
            dict(
                arm=name,
                milliseconds=round(seconds * 1e3, 2),
                tokens_per_second=round(rows.numel() / seconds),
                mfu=round(flops_per_step(name, size, rows) / seconds / ceiling, 4),
                peak_gib=round(max(m.peak_bytes for m in measured) / 2**30, 2),
                time_ratio=round(statistics.median(ratios), 4),
                time_ratio_spread=round(max(ratios) - min(ratios), 4),
                memory_ratio=round(measured[-1].peak_bytes / base[-1].peak_bytes, 4),
            )
        )
        print("  ".join(f"{key} {value}" for key, value in lines[-1].items()))
    print(json.dumps(dict(benchmark="train_step", device=torch.cuda.get_device_name(), torch=torch.__version__,
                          size=size, rows=rows.shape[0], length=rows.shape[1], matmul_tflops=round(ceiling / 1e12, 1),
                          arms=lines)))  # fmt: skip


if __name__ == "__main__":
    main()
