"""Measure speed.

mor bench throughput --dimensions 360m --pool 32seq,8GiB --concurrency best --first-try 32 --arms vanilla-4,mor-4
mor bench throughput --dimensions small --requests 16 --length 128 --length-sd 0 --peers generate,generate-1
mor bench throughput --model runs/a --model runs/b --data text.txt --figure pareto.svg
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mor.commands.common import add_device, depth_list

if TYPE_CHECKING:
    from mor.benchmark.arms import Arm
    from mor.benchmark.throughput import ThroughputOptions
    from mor.benchmark.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="throughput")
    throughput = actions.add_parser(
        "throughput",
        help="tokens per second in the engine, of arms side by side",
        description="Tokens per second of models in the engine, under a queue of requests. Every arm and peer runs in\n"
        "each round, so that ratios are of one run. A table, and one line of JSON last.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    _add_models(throughput)
    _add_workload(throughput)
    _add_measurement(throughput)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dimensions", default="small", metavar="D", help="tiny, small (default), 135m, 360m, ...")
    parser.add_argument(
        "--arms",
        type=_names,
        default="vanilla,mor-3",
        metavar="A,B,...",
        help="vanilla, vanilla-R (as many layers as R recursions need), recursive-R, mor-R,\n"
        "mor-R-token; the last three may add -shared or -hybrid (default vanilla,mor-3)",
    )
    parser.add_argument(
        "--mean-depth",
        type=depth_list,
        metavar="M,...",
        help="that MoR arms shall generate at (default (R+1)/2); what to ask for is looked for.\n"
        "With --model a list to ask for",
    )
    parser.add_argument(
        "--routing",
        choices=("calibrated", "random"),
        default="calibrated",
        help="depths of MoR arms: their own random router with calibrated thresholds,\n"
        "or random by place at exact shares (token-choice is always calibrated)",
    )
    parser.add_argument(
        "--model", action="append", metavar="PATH", help="a trained run instead of --arms; may be repeated"
    )
    parser.add_argument("--data", metavar="PATH", help="held-out text, with --model: quality is measured on it")
    parser.add_argument("--max-tokens", type=int, default=16384, metavar="N", help="tokens of it to score (16384)")
    parser.add_argument("--figure", metavar="FILE", help="draw quality against throughput, with --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add_device(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="requests in the queue (default 64)")
    parser.add_argument("--prompt", type=int, default=1, metavar="N", help="tokens of a prompt (default 1)")
    parser.add_argument("--length", type=float, default=256, metavar="N", help="mean tokens to generate (256)")
    parser.add_argument("--length-sd", type=float, default=64, metavar="S", help="their standard deviation (64)")
    parser.add_argument("--rates", type=depth_list, default=[], metavar="R,...", help="Poisson arrivals per second")
    parser.add_argument("--rate-seconds", type=float, metavar="S", help="they come for so long (until all have come)")
    parser.add_argument("--seed", type=int, default=0)


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", default="16", metavar="N", help="sequences at a time, or best (default 16)")
    parser.add_argument(
        "--first-try", type=int, default=1, metavar="N", help="where the search for the best begins (1)"
    )
    parser.add_argument(
        "--per-sequence", type=int, default=8, metavar="N", help="requests of a round per sequence, with best (8)"
    )
    parser.add_argument(
        "--pool",
        type=_names,
        default="fit",
        metavar="P,...",
        help="memory of keys and values, one measured after the other: fit, 2GiB, or what holds\n"
        "vanilla sequences, 32seq at the longest request and 32mean at the mean",
    )
    parser.add_argument(
        "--page-entries", type=int, default=16, metavar="N", help="entries of a page, of every arm (default 16)"
    )
    parser.add_argument(
        "--settle-tokens", type=int, default=65536, metavar="N", help="generated to try a mean depth (65536)"
    )
    parser.add_argument(
        "--peers",
        type=_names,
        default=(),
        metavar="P,...",
        help="also measure generate, generate-1 (one by one), llama-dynamic, llama-static, llama-batch",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--warmup-tokens", type=int, default=8, metavar="N", help="per sequence, not counted (8)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: greedy (default 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line here, after each pool")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from mor.benchmark.peers import check_peers
    from mor.benchmark.throughput import measure, settle_arms
    from mor.files import write_text
    from mor.show.machine import describe_machine
    from mor.show.terminal import make_console

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_peers(arguments.peers)
    options, notes = _options(arguments), make_console(stderr=True)
    arms, rows = _arms(arguments)
    arms = [replace(arm, page_entries=arguments.page_entries) for arm in arms]
    workload = _workload(arguments, arms, rows)

    def report(line: str) -> None:
        notes.print(line, highlight=False, soft_wrap=True)

    arms, settled = settle_arms(arms, workload, options[0], report=report)
    found = dict(arms=[], tries=[], latencies=[], quality=[], settled={n: asdict(s) for n, s in settled.items()})
    asked = {name: value for name, value in vars(arguments).items() if name not in ("action", "overrides", "json")}
    found |= dict(benchmark="throughput", machine=describe_machine(arms[0].model.device), options=asked)
    for one in options:
        results = measure(arms, workload, one, report=report)
        _print(arguments, results, rows, found)
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(found))
    print(json.dumps(found))


def _options(arguments: argparse.Namespace) -> list[ThroughputOptions]:
    """One for each pool."""
    from mor.benchmark.throughput import ThroughputOptions

    if arguments.concurrency != "best" and not arguments.concurrency.isdecimal():
        raise ValueError(f"--concurrency {arguments.concurrency!r} is neither a number nor best")
    common: dict[str, Any] = dict(
        concurrency=None if arguments.concurrency == "best" else int(arguments.concurrency),
        first_try=arguments.first_try,
        requests_per_sequence=arguments.per_sequence,
        settle_tokens=arguments.settle_tokens,
        warmup_tokens=arguments.warmup_tokens,
        rounds=arguments.rounds,
        rates=tuple(arguments.rates),
        rate_seconds=arguments.rate_seconds,
        peers=tuple(arguments.peers),
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    return [ThroughputOptions(pool=pool, **common) for pool in arguments.pool]


def _arms(arguments: argparse.Namespace) -> tuple[list[Arm], list[Any]]:
    """The arms, and with --model the held-out rows."""
    import torch

    from mor.benchmark.arms import build_arm
    from mor.benchmark.pareto import load_arms

    if arguments.model:
        return _trained(arguments, load_arms)
    if arguments.data or arguments.figure:
        raise ValueError("--data and --figure are about quality and need --model")
    if arguments.mean_depth and len(arguments.mean_depth) > 1:
        raise ValueError(f"--mean-depth {arguments.mean_depth} is a list, which needs --model")
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    settings: dict[str, Any] = dict(
        mean_depth=arguments.mean_depth[0] if arguments.mean_depth else None,
        routing=arguments.routing,
        max_length=max(256, arguments.prompt + int(2 * arguments.length)),
        device=device,
        dtype=getattr(torch, dtype),
    )
    return [build_arm(name, arguments.dimensions, **settings) for name in arguments.arms], []


def _trained(arguments: argparse.Namespace, load_arms: Any) -> tuple[list[Arm], list[Any]]:
    from mor.evaluate.text import open_rows

    if not arguments.data:
        raise ValueError("--model needs --data: held-out text to begin prompts with and to measure quality on")
    arms = [arm for path in arguments.model for arm in load_arms(path, arguments.mean_depth, device=arguments.device)]
    length = min(arm.model.config.max_position_embeddings for arm in arms)
    rows = open_rows(
        arguments.data, arms[0].tokenizer, batch_size=4, sequence_length=length, max_tokens=arguments.max_tokens
    )
    return arms, list(rows)


def _workload(arguments: argparse.Namespace, arms: list[Arm], rows: list[Any]) -> Workload:
    from mor.benchmark.workload import random_workload, text_workload

    shape: dict[str, Any] = dict(
        num_requests=arguments.requests,
        prompt_tokens=arguments.prompt,
        mean=arguments.length,
        deviation=arguments.length_sd,
        seed=arguments.seed,
    )
    if rows:
        return text_workload([row for batch in rows for row in batch.tolist()], **shape)
    return random_workload(vocab_size=arms[0].model.config.vocab_size, **shape)


def _print(arguments: argparse.Namespace, results: list[Any], rows: list[Any], found: dict[str, Any]) -> None:
    """Tables of one pool, whose lines are added to what was found."""
    from mor.benchmark.summary import INSIDE, LATENCY, QUALITY, SPEED, TRIES, latency_lines, lines, table, try_lines
    from mor.files import write_text
    from mor.show.terminal import make_console

    console = make_console()
    if not console.is_terminal:
        console.width = 150  # a log has room for all columns
    said, tries, latencies = lines(results), try_lines(results), latency_lines(results)
    if tries:
        console.print(table(tries, TRIES))
    console.print(f"pool {results[0].pool}, {results[0].requests:,} requests", highlight=False)
    console.print(table(said, SPEED))
    console.print(table([line for line in said if "visits" in line], INSIDE))
    for result in results:
        console.print(f"{result.arm.name}: depths {result.arm.routing}", highlight=False, soft_wrap=True)
    if latencies:
        console.print(table(latencies, LATENCY))
    if rows:
        from mor.benchmark.pareto import measure_points, pareto_figure

        points = measure_points(results, rows)
        console.print(table(points, QUALITY))
        if arguments.figure:
            write_text(Path(arguments.figure), pareto_figure(points))
        found["quality"] += points
    for name, new in (("arms", said), ("tries", tries), ("latencies", latencies)):
        found[name] += new
    found["routing"] = {result.arm.name: result.arm.routing for result in results}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
