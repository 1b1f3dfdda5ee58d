"""Decoding at a fixed number of sequences and a fixed context, of arms side by side, against what the hardware allows.

    python -m bench.decode [--arms vanilla,mor-3] [--points 512x2048,32x256,40GiBx2048,256x256:0.9] [--batches 8]
                           [--then vanilla-4,mor-4@256x256 ...]

Every sequence has a prompt of nearly the whole context, which it reaches in the middle of what is watched; sampling at
temperature 1. A point may name a pool in place of the sequences (each arm then has as many as its keys and values fit),
and top-p after a colon. `--then`: more arms at more points, in the same process; models that differ only in how they
are batched are built once, and nothing is measured twice. Random weights at the dimensions of the 360M model, in
bfloat16 (without a GPU: a small model in float32). What to ask of arms with a router is settled at each point, so that
what is watched has the mean depth wanted, to 1%. The lower bound of a token is the larger of two times: the bytes that
it must move (its share of the weights of its visits, the keys and values that it reads and writes) at the speed of a
copy, and its FLOPs at the speed of a large matrix product, both measured first. Prints a table, and one line of JSON
last.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.clock import copy_rate, matmul_rate
from bench.decode_point import Point, Spot
from mor.benchmark.arms import Arm, build_arm
from mor.benchmark.settle import TOLERANCE
from mor.files import write_text

Line = dict[str, Any]


class Bench:
    """Measures lines one after the other, and keeps what was built and measured.

    `missing`: what was not measured, with the reason.
    """

    def __init__(self, dimensions: str, settings: dict[str, Any], batches: int, rates: tuple[float, float]) -> None:
        self.lines, self.missing = list[Line](), list[dict[str, str]]()
        self._dimensions, self._settings, self._batches, self._rates = dimensions, settings, batches, rates
        self._built = dict[str, Arm]()

    def arm(self, name: str) -> Arm:
        """An arm; those that differ only in their batching share a model."""
        model, _, batching = name.rpartition("-")
        if batching not in ("lockstep", "depthwise"):
            model, batching = name, ""
        if model not in self._built:
            self._built[model] = build_arm(model, self._dimensions, **self._settings)
        return replace(self._built[model], name=name, lockstep=batching == "lockstep" if batching else None)

    def run(self, name: str, spot: Spot) -> Line | None:
        """Measure one arm at one point, unless that was done. An error is noted, and the next point may do better."""
        if any((line["arm"], line["point"]) == (name, str(spot)) for line in self.lines):
            return None
        try:
            line = self._measure(name, spot)
        except (AssertionError, RuntimeError, ValueError) as error:
            self.miss(name, spot, f"{type(error).__name__}: {error}")
            return None
        finally:
            gc.collect()
            if self._settings["device"] == "cuda":
                torch.cuda.empty_cache()
        base = self._baseline(line)
        line["times_vanilla"] = line["tokens_per_second"] / base["tokens_per_second"]
        line["share_of_ideal"] = line["times_vanilla"] / (base["least_us_per_token"] / line["least_us_per_token"])
        self.lines.append(line)
        return line

    def miss(self, name: str, spot: Spot, reason: str) -> None:
        """Note what was not measured."""
        self.missing.append(dict(arm=name, point=str(spot), reason=reason))
        print(f"{name:12} {spot}: not measured, {reason}", flush=True)

    def _measure(self, name: str, spot: Spot) -> Line:
        start, arm = time.perf_counter(), self.arm(name)
        point, built = Point(arm, spot, self._batches), time.perf_counter()
        settled, found = point.settle(), time.perf_counter()
        point.start(None if settled is None else settled.asked, point.sequences)
        filled = time.perf_counter()
        seen = point.watch()
        line: Line = dict(arm=name, point=str(spot), place=spot.place, sequences=point.sequences)
        line |= dict(context=spot.context, top_p=spot.top_p, recursions=arm.model.config.num_recursions)
        line |= dict(layers=arm.model.config.num_hidden_layers, wanted_depth=arm.wanted_depth)
        if settled is not None:
            line |= dict(asked_depth=settled.asked, settled_depth=settled.generated, settling_tries=settled.tries)
        line |= dict(seconds_to_build=built - start, seconds_to_settle=found - built, seconds_to_fill=filled - found)
        return line | seen | point.lower_bound(seen, *self._rates)

    def _baseline(self, line: Line) -> Line:
        """The vanilla arm at the same point with as many layers, else with any, else this arm."""
        plain = [other for other in self.lines if other["point"] == line["point"] and other["recursions"] == 1]
        same = [other for other in plain if other["layers"] == line["layers"]]
        return next(iter([*same, *plain]), line)


def say(line: Line) -> None:
    asked = ""
    if "asked_depth" in line:
        off = ", off" if abs(line["mean_depth"] - line["wanted_depth"]) > TOLERANCE * line["wanted_depth"] else ""
        asked = f" (asked {line['asked_depth']:.3f}, {line['settling_tries']} tries{off})"
    print(
        f"{line['arm']:12} {line['sequences']:5} x {line['context']:5}: {line['tokens_per_second']:10,.0f} tokens/s"
        f"  visit {line['visit_ms']:7.3f} ms  idle {line['device_idle_ms']:.4f}  depth {line['mean_depth']:.3f}{asked}"
        f"  bandwidth {line['bandwidth_share']:.3f}  of bound {line['share_of_bound']:.3f}"
        f"  x{line['times_vanilla']:.3f}  of ideal {line['share_of_ideal']:.3f}"
        f"  built, settled, filled in {line['seconds_to_build']:.1f}, {line['seconds_to_settle']:.1f},"
        f" {line['seconds_to_fill']:.1f} s",
        flush=True,
    )


def main() -> None:
    start, arguments = time.perf_counter(), _parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = [(name, spot) for group in _groups(arguments) for spot in group[1] for name in group[0]]
    rates = copy_rate(device), matmul_rate(device)
    print(f"copy {rates[0] / 1e12:.2f} TB/s, matrix product {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    settings: dict[str, Any] = dict(
        mean_depth=arguments.mean_depth,
        max_length=max(spot.context for _, spot in work) + 1024,
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
    bench = Bench(arguments.dimensions, settings, arguments.batches, rates)
    for name, spot in work:
        if arguments.seconds is not None and time.perf_counter() - start > arguments.seconds:
            bench.miss(name, spot, "no time left")
            continue
        line = bench.run(name, spot)
        if line is not None:
            say(line)
        if arguments.json is not None:
            write_text(arguments.json, as_json(device, rates, bench))
    print(as_json(device, rates, bench))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="vanilla,mor-3")
    parser.add_argument("--points", default="256x256", help="SEQUENCESxCONTEXT, POOLxCONTEXT, either with :TOP_P, ...")
    parser.add_argument("--then", action="append", default=[], metavar="ARMS@POINTS", help="more; may be repeated")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--mean-depth", type=float, help="that arms with a router shall generate at; (R+1)/2")
    parser.add_argument("--seconds", type=float, help="begin nothing after these")
    parser.add_argument("--json", type=Path, help="also write the last line here, after each point")
    parser.add_argument("--dimensions", default="360m" if torch.cuda.is_available() else "tiny")
    return parser


def _groups(arguments: argparse.Namespace) -> list[tuple[list[str], list[Spot]]]:
    """Arms and the points they are measured at, in order."""
    asked = [f"{arguments.arms}@{arguments.points}", *arguments.then]
    parts = [text.partition("@") for text in asked]
    return [(names.split(","), [Spot.of(text) for text in points.split(",")]) for names, _, points in parts]


def as_json(device: str, rates: tuple[float, float], bench: Bench) -> str:
    """All that was measured, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found = dict(benchmark="decode", device=name, torch=torch.__version__, lines=bench.lines, missing=bench.missing)
    return json.dumps(found | dict(copy_tb_s=rates[0] / 1e12, matmul_tflop_s=rates[1] / 1e12))


if __name__ == "__main__":
    main()
