"""An arm at a number of sequences and a context, filled, settled and watched while it decodes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.clock import wait
from mor.benchmark.arms import Arm
from mor.benchmark.pools import parse_pool
from mor.benchmark.serving import pages_for, pages_in
from mor.benchmark.settle import Settled, bounds_of, settle
from mor.engine.engine import Engine
from mor.engine.kv_store import PageLayout
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.model.decision import budget_shares
from mor.model.depth_plan import linear_capacities

RESERVED = 32
"""Entries of pages that slots hold ahead."""

SETTLING = 256
"""Sequences that a mean depth is looked for with. Where there are no more, they are those that are watched."""

FEW, MOST_BATCHES = 32, 64
"""So few sequences are watched for longer: for as many tokens as half of the context, but no more batches."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where to measure: `place` is a number of sequences, or a pool like `40GiB`. `top_p`: of the sampling."""

    place: str
    context: int
    top_p: float = 1.0

    @classmethod
    def of(cls, text: str) -> Spot:
        """`512x2048`, `40GiBx2048`, or `256x256:0.9` for top-p. Raises ValueError for anything else."""
        shape, _, top_p = text.partition(":")
        place, _, context = shape.partition("x")
        if not context.isdigit() or (not place.isdigit() and parse_pool(place)[1] != "GiB"):
            raise ValueError(f"point {text!r} is not like 512x2048, 40GiBx2048 or 256x256:0.9")
        return cls(place=place, context=int(context), top_p=float(top_p or 1))

    def __str__(self) -> str:
        return f"{self.place}x{self.context}" + (f":{self.top_p:g}" if self.top_p < 1 else "")

    def room_for(self, arm: Arm) -> tuple[int, int | None]:
        """Sequences of an arm, and pages if they are limited: as many as fit when their tokens take recursions as is
        wanted of the arm."""
        if self.place.isdigit():
            return int(self.place), None
        recursions, shape = arm.model.config.num_recursions, PageLayout.of(arm.model.config, arm.page_entries).shape
        shares = [1.0] * recursions
        if arm.wanted_depth is not None:
            shares = budget_shares(arm.wanted_depth, linear_capacities(recursions))
        pages, num_pages = 0.0, pages_in(parse_pool(self.place)[0] * 2**30, arm)
        for size, holds_all, written, share in zip(
            shape.tokens_per_page, shape.holds_all, shape.written, [*shares, 1.0]
        ):
            pages += written * (0.5 + (self.context * (1.0 if holds_all else share) + RESERVED) / size)
        return int(0.98 * num_pages / pages), num_pages


class Point:
    """An arm at a spot. Its sequences have a prompt of nearly the whole context, which they reach in the middle of what
    is watched."""

    def __init__(self, arm: Arm, spot: Spot, batches: int) -> None:
        self.arm, self.spot = arm, spot
        self.sequences, num_pages = spot.room_for(arm)
        visits = 8 if self.sequences <= 64 else 16
        depth = arm.wanted_depth or arm.model.config.num_recursions  # visits of a token
        if self.sequences <= FEW:
            batches = max(batches, min(MOST_BATCHES, round(spot.context * depth / (2 * visits))))
        self.batches = batches
        self.prompt = max(2, round(spot.context - (3 + batches / 2) * visits / depth))
        self.output = (batches + 5) * visits
        self.engine = Engine(
            arm.model,
            arm.tokenizer,
            EngineOptions(
                page_entries=arm.page_entries,
                max_requests=self.sequences,
                num_pages=num_pages or pages_for(arm, self.sequences, self.prompt + self.output),
                slot_visits=visits,
                max_visit_tokens=16384,
                prefill_chunk=2048,
                prefix_caching=False,
                slots=True,
                lockstep=arm.lockstep,
            ),
        )
        assert self.engine.slots is not None
        self.slots = self.engine.slots

    def settle(self) -> Settled | None:
        """What to ask for, so that the depth wanted is what is generated where it is watched; None without a router."""
        if self.arm.wanted_depth is None:
            return None

        def generated(asked: float) -> float:
            self.start(asked, min(self.sequences, SETTLING))
            depths = [depth for outputs in self._steps() for output in outputs for depth in output.depths]
            self.end()
            return sum(depths) / max(1, len(depths))

        return settle(generated, self.arm.wanted_depth, bounds=bounds_of(self.arm))

    def start(self, asked: float | None, sequences: int) -> None:
        """Compute all prompts, and begin to decode."""
        draw, words = random.Random(0), range(1, self.arm.model.config.vocab_size)
        for number in range(sequences):
            params = SamplingParams(
                max_tokens=self.output,
                temperature=1.0,
                top_p=self.spot.top_p,
                ignore_eos=True,
                seed=number,
                mean_depth=asked,
            )
            self.engine.add_request(str(number), draw.choices(words, k=self.prompt), params)
        run, self.slots.run = self.slots.run, lambda *arguments: 0  # type: ignore[method-assign,assignment]
        while not all(request.is_decoding_alone for request in self.engine.scheduler.running) or (
            self.engine.scheduler.num_waiting
        ):
            self.engine.step()
        self.slots.run = run  # type: ignore[method-assign]
        for steps in (3, 0):  # what turns in a visit may be known better afterwards
            self.slots.warm_up([sequences], [self.prompt, self.prompt + self.output], [self.spot.top_p < 1])
            for _ in range(steps):
                self.engine.step()

    def _steps(self) -> Iterator[list[RequestOutput]]:
        """What the steps tell that are watched; the first tells of the batch before, which does not count."""
        for number in range(self.batches + 1):
            outputs = self.engine.step()
            yield outputs if number else []

    def end(self) -> None:
        """Leave the engine empty."""
        for request in [*self.engine.scheduler.running]:
            self.engine.abort(request.id)
        while self.slots.in_flight:
            self.slots.collect()
        wait(self.arm.model.device.type)

    def watch(self) -> dict[str, float]:
        """Tokens per second, and what the device did meanwhile.

        Time is the device's, from the beginning of the first batch that counts to that of the one behind the last: what
        the host does before the first and after the last is nobody's. `host_seconds` has that too.
        """
        device, begun, depths, visits = self.arm.model.device.type, [], list[int](), list[int]()
        run = self.slots.run

        def timed(*arguments: Any) -> int:
            begun.append(_mark(device))
            visits.append(run(*arguments))
            begun.append(_mark(device))
            return visits[-1]

        self.slots.run = timed  # type: ignore[method-assign]
        wait(device)
        lengths = self._lengths()
        start, preempted = time.perf_counter(), self.engine.statistics.preemptions
        for outputs in self._steps():
            for output in outputs:
                depths += output.depths
        took = time.perf_counter() - start  # one batch more is queued, and none of it counted
        wait(device)
        self.slots.run = run  # type: ignore[method-assign]
        assert self.engine.statistics.preemptions == preempted, "sequences were preempted while they were watched"
        lengths = [(before + after) / 2 for before, after in zip(lengths, self._lengths(), strict=True)]
        number, time_ms = sum(visits[:-1]), _between(begun[0], begun[-2])
        busy = sum(_between(a, b) for a, b in zip(begun[:-2:2], begun[1:-2:2]))
        return {
            "tokens_per_second": 1e3 * len(depths) / time_ms,
            "host_seconds": took,
            "visits": number,
            "visit_ms": time_ms / number,
            "device_busy_ms": busy / number,
            "device_idle_ms": (time_ms - busy) / number,
            "mean_depth": sum(depths) / max(1, len(depths)),
            **{f"depth_over_{r}": sum(d > r for d in depths) / max(1, len(depths)) for r in range(len(lengths))},
            **{f"entries_{s}": length for s, length in enumerate(lengths)},
        }

    def _lengths(self) -> list[float]:
        """Entries of each virtual sequence, mean over the slots."""
        return self.slots._state.lengths[: self.sequences].double().mean(0).tolist()  # type: ignore[no-any-return]

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
