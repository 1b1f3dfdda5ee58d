"""Decoding at a fixed number of sequences and a fixed context, of arms side by side, against what the hardware allows.

    python -m bench.decode [--arms vanilla,mor-3] [--points 512x2048,32x256,40GiBx2048] [--batches 8]

Every sequence has a prompt of nearly the whole context, which it reaches in the middle of what is watched; sampling at
temperature 1. A point may name a pool in place of the sequences: each arm then has as many as its keys and values fit.
Random weights at the dimensions of the 360M model, in bfloat16 (without a GPU: a small model in
float32); depths as in `mor bench throughput`. The lower bound of a token is the larger of two times: the bytes that it
must move (its share of the weights of its visits, the keys and values that it reads and writes) at the speed of a copy,
and its FLOPs at the speed of a large matrix product, both measured first. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from bench.clock import copy_rate, matmul_rate, wait
from mor.benchmark.arms import Arm, build_arm
from mor.benchmark.serving import PAGE_ENTRIES, pages_for, pages_in
from mor.benchmark.throughput import parse_pool
from mor.engine.engine import Engine
from mor.engine.kv_store import PageLayout
from mor.engine.options import EngineOptions
from mor.engine.params import SamplingParams
from mor.model.decision import budget_shares
from mor.model.depth_plan import linear_capacities

RESERVED = 32
"""Entries of pages that slots hold ahead."""


class Point:
    """An arm at a number of sequences and a context, ready to be watched."""

    def __init__(self, arm: Arm, sequences: int, context: int, batches: int, num_pages: int | None = None) -> None:
        self.arm, self.sequences, self.batches = arm, sequences, batches
        visits = 8 if sequences <= 64 else 16
        self.prompt, self.output = max(2, context - (3 + batches // 2) * visits), (batches + 5) * visits
        self.engine = Engine(
            arm.model,
            arm.tokenizer,
            EngineOptions(
                max_requests=sequences,
                num_pages=num_pages or pages_for(arm, sequences, self.prompt + self.output),
                slot_visits=visits,
                max_visit_tokens=16384,
                prefill_chunk=2048,
                prefix_caching=False,
                slots=True,
                lockstep=arm.lockstep,
            ),
        )
        assert self.engine.slots is not None
        self.visits = visits

    def start(self) -> None:
        """Compute all prompts, and begin to decode."""
        draw, slots = random.Random(0), self.engine.slots
        assert slots is not None
        for number in range(self.sequences):
            prompt = [draw.randrange(1, self.arm.model.config.vocab_size) for _ in range(self.prompt)]
            params = SamplingParams(
                max_tokens=self.output, temperature=1.0, ignore_eos=True, seed=number, mean_depth=self.arm.mean_depth
            )
            self.engine.add_request(str(number), prompt, params)
        run, slots.run = slots.run, lambda *arguments: 0  # type: ignore[method-assign,assignment]
        while not all(request.is_decoding_alone for request in self.engine.scheduler.running) or (
            self.engine.scheduler.num_waiting
        ):
            self.engine.step()
        slots.run = run  # type: ignore[method-assign]
        slots.warm_up([self.sequences], [self.prompt, self.prompt + self.output], [False])
        for _ in range(3):
            self.engine.step()

    def watch(self) -> dict[str, float]:
        """Tokens per second, and what the device did meanwhile."""
        device, begun, depths = self.arm.model.device.type, [], list[int]()
        slots = self.engine.slots
        assert slots is not None
        run = slots.run

        def timed(*arguments: Any) -> int:
            begun.append(_mark(device))
            visits = run(*arguments)
            begun.append(_mark(device))
            return visits

        slots.run = timed  # type: ignore[method-assign]
        wait(device)
        start, tokens, preempted = time.perf_counter(), 0, self.engine.statistics.preemptions
        for number in range(self.batches + 1):
            for output in self.engine.step():
                if number:  # the first step tells of the batch before, which is done already
                    tokens += len(output.token_ids)
                    depths += output.depths
        took = time.perf_counter() - start  # one batch more is queued, and none of it counted
        wait(device)
        slots.run = run  # type: ignore[method-assign]
        assert self.engine.statistics.preemptions == preempted, "sequences were preempted while they were watched"
        lengths = slots._state.lengths[: self.sequences].double().mean(0).tolist()
        counted = begun[:-2]
        idle = sum(_between(a, b) for a, b in zip(counted[1::2], counted[2::2]))
        busy = sum(_between(a, b) for a, b in zip(counted[::2], counted[1::2]))
        visits = self.batches * self.visits
        return {
            "tokens_per_second": tokens / took,
            "visit_ms": 1e3 * took / visits,
            "device_busy_ms": busy / visits,
            "device_idle_ms": idle / visits,
            "mean_depth": sum(depths) / max(1, len(depths)),
            **{f"depth_over_{r}": sum(d > r for d in depths) / max(1, len(depths)) for r in range(len(lengths))},
            **{f"entries_{s}": length for s, length in enumerate(lengths)},
        }

    def lower_bound(self, seen: dict[str, float], copy_rate: float, flop_rate: float) -> dict[str, float]:
        """Bytes and FLOPs per token, and the least seconds that a token can take."""
        model, layout = self.arm.model, self.engine.runner.layout
        size, plan, config = model.dtype.itemsize, model.config.depth_plan, model.config
        block = sum(p.numel() for p in model.model.recursion.block.parameters())
        outer = sum(p.numel() for n in ("first_layers", "last_layers") for p in getattr(model.model, n).parameters())
        head = model.lm_head.weight.numel()
        visits = max(1.0, seen["mean_depth"])
        entry = 2 * layout.heads * layout.head_size * size
        read = sum(
            seen[f"depth_over_{r}"] * (seen[f"entries_{0 if config.kv_cache == 'shared' else r}"] + 1)
            for r in range(plan.num_recursions)
        )
        outer_read = seen[f"entries_{plan.num_recursions}"] + 1 if plan.num_outer else 0
        kv = entry * (plan.block_size * read + 2 * plan.num_outer * outer_read)
        weights = visits * size * (block + outer + head) / self.sequences
        heads = config.num_attention_heads * layout.head_size
        flops = 2 * (visits * block + outer + head)
        flops += 4 * heads * (plan.block_size * read + 2 * plan.num_outer * outer_read)
        return {
            "bytes_per_token": kv + weights,
            "flops_per_token": flops,
            "least_us_per_token": 1e6 * max((kv + weights) / copy_rate, flops / flop_rate),
            "bandwidth_share": (kv + weights) * seen["tokens_per_second"] / copy_rate,
            "share_of_bound": max((kv + weights) / copy_rate, flops / flop_rate) * seen["tokens_per_second"],
        }


def _mark(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    """Milliseconds between two marks."""
    return 1e3 * (second - first) if isinstance(first, float) else first.elapsed_time(second)


def room_for(place: str, context: int, arm: Arm) -> tuple[int, int | None]:
    """Sequences of an arm, and pages if they are limited. `place`: a number, or a pool like `40GiB`, which holds so
    many at `context` when tokens take recursions as the arm's depth budget says."""
    if place.isdigit():
        return int(place), None
    recursions, shape = arm.model.config.num_recursions, PageLayout.of(arm.model.config, PAGE_ENTRIES).shape
    shares = [1.0] * recursions
    if arm.mean_depth is not None:
        shares = budget_shares(arm.mean_depth, linear_capacities(recursions))
    pages, num_pages = 0.0, pages_in(parse_pool(place)[0] * 2**30, arm)
    for size, holds_all, written, share in zip(shape.tokens_per_page, shape.holds_all, shape.written, [*shares, 1.0]):
        pages += written * (0.5 + (context * (1.0 if holds_all else share) + RESERVED) / size)
    return int(0.98 * num_pages / pages), num_pages


def measure(arm: Arm, place: str, context: int, batches: int, rates: tuple[float, float]) -> dict[str, Any]:
    """One point of one arm."""
    sequences, num_pages = room_for(place, context, arm)
    point = Point(arm, sequences, context, batches, num_pages)
    start = time.perf_counter()
    point.start()
    filled = time.perf_counter() - start
    seen = point.watch()
    line = dict(arm=arm.name, place=place, sequences=sequences, context=context, seconds_to_fill=filled, **seen)
    return line | point.lower_bound(seen, *rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="vanilla,mor-3")
    parser.add_argument("--points", default="256x256", help="SEQUENCESxCONTEXT or POOLxCONTEXT,...")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--mean-depth", type=float, help="asked of arms with a router; what is measured is lower")
    parser.add_argument("--json", type=Path, help="also write the last line here, after each point")
    parser.add_argument("--dimensions", default="360m" if torch.cuda.is_available() else "tiny")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rates = copy_rate(device), matmul_rate(device)
    print(f"copy {rates[0] / 1e12:.2f} TB/s, matrix product {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    points = [(point.partition("x")[0], int(point.partition("x")[2])) for point in arguments.points.split(",")]
    settings: dict[str, Any] = dict(max_length=max(c for _, c in points) + 256, device=device, dtype=dtype)
    names, lines = arguments.arms.split(","), list[dict[str, Any]]()
    arms = {name: build_arm(name, arguments.dimensions, mean_depth=arguments.mean_depth, **settings) for name in names}
    for point, context in points:
        first: dict[str, Any] | None = None
        for name in names:
            line = measure(arms[name], point, context, arguments.batches, rates)
            first = first or line
            speed_up = line["tokens_per_second"] / first["tokens_per_second"]
            line["times_first"], line["share_of_ideal"] = (
                speed_up,
                speed_up / (first["least_us_per_token"] / line["least_us_per_token"]),
            )
            lines.append(line)
            print(
                f"{name:12} {line['sequences']:5} x {context:5}: {line['tokens_per_second']:10,.0f} tokens/s"
                f"  visit {line['visit_ms']:7.3f} ms  idle {line['device_idle_ms']:.4f}  depth {line['mean_depth']:.2f}"
                f"  bandwidth {line['bandwidth_share']:.3f}  of bound {line['share_of_bound']:.3f}"
                f"  x{line['times_first']:.3f}  of ideal {line['share_of_ideal']:.3f}"
                f"  filled in {line['seconds_to_fill']:.1f} s",
                flush=True,
            )
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            if arguments.json is not None:
                arguments.json.write_text(as_json(device, rates, lines))
    print(as_json(device, rates, lines))


def as_json(device: str, rates: tuple[float, float], lines: list[dict[str, Any]]) -> str:
    """All that was measured, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found = dict(benchmark="decode", device=name, torch=torch.__version__, lines=lines)
    return json.dumps(found | dict(copy_tb_s=rates[0] / 1e12, matmul_tflop_s=rates[1] / 1e12))


if __name__ == "__main__":
    main()
