"""Declared lists of benchmarks, run one after the other within a time.

    python -m bench.suite engine --seconds 1500 --out FOLDER [--only decode,peers]
    python -m bench.suite --list

`engine` is what the table and the figures of the inference engine need, `serving` the same for the server, both on one
NVIDIA H200; `tiny` is a minute of the same commands on a CPU. The most important come first. Each is a process of its
own with a limit of its own; FOLDER gets its output (`NAME.log`) and its results (`NAME.json`), and `suite.json` says
what became of each. What does not fit is named. `python -m bench.figures FOLDER/*.json --out FOLDER` draws what was
found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SLACK = 1.6
"""A command is ended after so many times the seconds that it should take."""
LEAST = 0.7
"""It is not begun when less than this share of them is left."""
FAREWELL = 12
"""Seconds before its limit at which `bench.decode` begins nothing more."""
ENVIRONMENT = dict(PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One benchmark. `command`: of `python -m`, where {out} is the folder and {seconds} what it may take. `seconds`:
    that it should take; `answers`: which question."""

    name: str
    seconds: float
    answers: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an item: `done`, `failed`, `ended` by its limit, or `left out` for want of time."""

    name: str
    status: str
    seconds: float
    expected: float
    note: str = ""


_H200 = "mor bench throughput --dimensions 360m --json {out}/"
_POOLS = "--arms vanilla-4,mor-4 --concurrency best --prompt 1 --length 256 --length-sd 64 --warmup-tokens 16"
_STREAMS = "mor-3:360m --streams 256 --requests 1280 --prompt 32 --tokens 256 --kv-memory-gib 24 --processes 6"
_TINY = "mor bench throughput --dimensions tiny --json {out}/"

# Seconds on one H200: imports 8, a model of 360M 5, an engine with its captures 3; filling 512 x 2,048 takes 10 to 20.
SUITES: dict[str, tuple[Item, ...]] = {
    "engine": (
        Item(
            name="decode",
            seconds=200,
            answers="MoR beside vanilla, shares of what the hardware allows, the ablation, 40 GiB at 2,048, top-p",
            command="bench.decode --arms vanilla,mor-3 --points 512x2048,256x256,32x256,1x256,1024x1024"
            " --then recursive-3,recursive-3-depthwise,mor-3-lockstep@256x256 --then vanilla-4,mor-4@40GiBx2048"
            " --then vanilla,mor-3@256x256:0.9 --seconds {seconds} --json {out}/decode.json",
        ),
        Item(
            name="peers",
            seconds=150,
            answers="the engine beside transformers, which compiles",
            command=_H200 + "peers.json --arms vanilla --requests 256 --prompt 32 --length 256 --length-sd 0"
            " --concurrency 256 --rounds 1 --warmup-tokens 256 --peers llama-static,llama-batch",
        ),
        Item(
            name="pool-32",
            seconds=170,
            answers="a pool of 32 vanilla sequences, in both readings, each model at its best",
            command=_H200 + f"pool-32.json {_POOLS} --pool 32mean,32seq --first-try 32 --rounds 2",
        ),
        Item(
            name="pool-8gib",
            seconds=150,
            answers="a pool of 8 GiB, each model at its best",
            command=_H200 + f"pool-8gib.json {_POOLS} --pool 8GiB --first-try 768 --rounds 1 --per-sequence 4",
        ),
        Item(
            name="growth",
            seconds=170,
            answers="tokens per second against sequences, context and recursions",
            command="bench.decode --arms vanilla,mor-3 --points 4x256,16x256,64x256,2048x256,64x128,64x512,64x2048"
            " --then vanilla,mor-2,mor-3,vanilla-4,mor-4@256x256 --then vanilla,mor-3@64x8192,512x256,1024x256,1x256"
            " --then vanilla,mor-3@64x1024,64x4096 --seconds {seconds} --json {out}/growth.json",
        ),
        Item(
            name="latency",
            seconds=110,
            answers="time to the first token and between pieces against load",
            command=_H200 + "latency.json --arms vanilla,mor-3 --requests 512 --prompt 128 --length 256 --length-sd 64"
            " --concurrency 256 --rounds 1 --rates 50,100,200,300,400,500 --rate-seconds 4",
        ),
        Item(
            name="kernels",
            seconds=60,
            answers="attention, layers and draws alone, top-p among them",
            command="bench.kernels --rows 1,32,256 --points 32x256,256x256,512x2048",
        ),
    ),
    "serving": (
        Item(
            name="serving-throughput",
            seconds=220,
            answers="the server beside the engine alone",
            command=f"bench.serving throughput {_STREAMS} --rounds 2",
        ),
        Item(
            name="serving-queue",
            seconds=75,
            answers="short requests beside a queue of long prompts",
            command="bench.serving queue mor-3:360m --streams 32 --prompt 32 --tokens 256 --long 64 --long-prompt 1536"
            " --seconds 8 --kv-memory-gib 48",
        ),
        Item(
            name="serving-profile",
            seconds=75,
            answers="where the time of the server and of the engine goes",
            command=f"bench.serving profile {_STREAMS} --profile {{out}}/profile",
        ),
    ),
    "tiny": (
        Item(
            name="decode",
            seconds=30,
            answers="as engine",
            command="bench.decode --dimensions tiny --batches 3 --arms vanilla,mor-3 --points 1x48,4x48,8x48,4x96"
            " --then recursive-3,recursive-3-depthwise,mor-3-lockstep,mor-2,vanilla-4,mor-4@8x48"
            " --seconds {seconds} --json {out}/decode.json",
        ),
        Item(
            name="pool",
            seconds=30,
            answers="as engine",
            command=_TINY + "pool.json --arms vanilla-4,mor-4 --concurrency best --pool 2mean,2seq --first-try 2"
            " --length 16 --length-sd 4 --rounds 1",
        ),
        Item(
            name="latency",
            seconds=30,
            answers="as engine",
            command=_TINY + "latency.json --arms vanilla,mor-3 --requests 8 --prompt 4 --length 12 --length-sd 3"
            " --concurrency 4 --rounds 1 --rates 4,16,64 --rate-seconds 1",
        ),
    ),
}


def run_suite(items: tuple[Item, ...], out: Path, seconds: float) -> list[Outcome]:
    """Run what fits in `seconds`, in order. An item that does not fit gives way to those after it that do."""
    out.mkdir(parents=True, exist_ok=True)
    start, outcomes = time.monotonic(), list[Outcome]()
    for item in items:
        left = seconds - (time.monotonic() - start)
        if left < LEAST * item.seconds:
            note = f"{item.seconds:.0f} s wanted, {max(0.0, left):.0f} left"
            outcomes.append(Outcome(name=item.name, status="left out", seconds=0, expected=item.seconds, note=note))
        else:
            print(f"{item.name}: {item.answers}; about {item.seconds:.0f} s, {left:.0f} left", flush=True)
            outcomes.append(run_item(item, out, min(SLACK * item.seconds, left)))
            print("\n".join(f"  {line}" for line in headlines(results_of(item, out))), flush=True)
        print(describe(outcomes[-1]), flush=True)
        (out / "suite.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    return outcomes


def run_item(item: Item, out: Path, limit: float) -> Outcome:
    """Run one item with at most `limit` seconds; its whole process group is ended after these."""
    words = item.command.format(out=out, seconds=max(1, round(limit - FAREWELL))).split()
    (out / f"{item.name}.json").unlink(missing_ok=True)  # of a run before
    start, log = time.monotonic(), out / f"{item.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
        try:
            code = process.wait(limit)
            status, note = ("done", "") if code == 0 else ("failed", f"exit status {code}, see {log.name}")
        except subprocess.TimeoutExpired:
            status, note = "ended", f"by its limit of {limit:.0f} s; what was found so far stands"
        finally:
            _end_group(process)
    return Outcome(
        name=item.name, status=status, seconds=round(time.monotonic() - start, 1), expected=item.seconds, note=note
    )


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of those that it started: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def results_of(item: Item, out: Path) -> dict[str, Any]:
    """The results of an item, empty if there are none: from its own file, else the last line of its log."""
    target, log = out / f"{item.name}.json", out / f"{item.name}.log"
    if not target.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('{"benchmark"')]
        if not lines:
            return {}
        target.write_text(lines[-1])
    return json.loads(target.read_text())


def headlines(found: dict[str, Any]) -> list[str]:
    """Results in a line each, as far as they are those of `bench.decode` or `mor bench throughput`."""
    said = [
        f"{line['arm']} {line['point']}: {line['tokens_per_second']:,.0f} tokens/s, x{line['times_vanilla']:.3f}, "
        f"depth {line['mean_depth']:.3f}, of ideal {line['share_of_ideal']:.3f}, "
        f"bandwidth {line['bandwidth_share']:.3f}"
        for line in found.get("lines", [])
        if "times_vanilla" in line
    ]
    said += [f"{miss['arm']} {miss['point']}: not measured, {miss['reason']}" for miss in found.get("missing", [])]
    for line in found.get("arms", []):
        times = line.get("times_vanilla")
        part = "" if times is None else f", x{times:.3f} vanilla, depth {line['mean_depth']:.3f}"
        if "engine_is_times" in line:
            part = f", the engine is x{line['engine_is_times']:.2f}"
        said.append(
            f"{line['arm']} {line['system']} in {line['pool']} at {line['concurrency']}: "
            f"{line['tokens_per_second']:,.0f} tokens/s ({line['rate']}){part}"
        )
    said += [
        f"{line['arm']} at {line['requests_per_second']:g} requests/s: first token {line['first_token_p50']} s (p99 "
        f"{line['first_token_p99']}), between pieces {line['gap_p50']} s (p99 {line['gap_p99']})"
        for line in found.get("latencies", [])
    ]
    return said


def describe(outcome: Outcome) -> str:
    took = f"{outcome.seconds:6.1f} s of {outcome.expected:.0f}"
    return f"{outcome.name:20} {outcome.status:9} {took}  {outcome.note}".rstrip()


def chosen(suite: str, only: str | None) -> tuple[Item, ...]:
    """The items of a suite, or those named. Raises ValueError for a name that it does not have."""
    items = SUITES[suite]
    if only is None:
        return items
    names = only.split(",")
    unknown = [name for name in names if name not in {item.name for item in items}]
    if unknown:
        raise ValueError(f"suite {suite!r} has no {', '.join(unknown)}; it has {', '.join(i.name for i in items)}")
    return tuple(item for item in items if item.name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", choices=(*SUITES,))
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", metavar="A,B,...", help="these items alone")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    arguments = parser.parse_args()
    if arguments.list or arguments.suite is None:
        for name, items in SUITES.items():
            print(f"{name}: {sum(item.seconds for item in items):.0f} s")
            for item in items:
                print(f"  {item.name:20} {item.seconds:4.0f} s  {item.answers}\n    python -m {item.command}")
        return
    try:
        items = chosen(arguments.suite, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    outcomes = run_suite(items, arguments.out, arguments.seconds)
    print(f"\n{arguments.suite}, results in {arguments.out}:")
    for item in items:
        print(describe(next(outcome for outcome in outcomes if outcome.name == item.name)))
        if (arguments.out / f"{item.name}.log").exists():
            print("\n".join(f"    {line}" for line in headlines(results_of(item, arguments.out))))
    sys.exit(0 if all(outcome.status == "done" for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
