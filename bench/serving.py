"""The server measured: its throughput beside the engine's own, and a crowd of clients of all kinds.

python -m bench.serving throughput MODEL [--streams 32 --requests 128 --tokens 100 --prompt 32 --threads 1]
python -m bench.serving crowd MODEL [--clients 1000 --seconds 120]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from mor.benchmark.server_crowd import watch_crowd
from mor.benchmark.server_throughput import make_prompts, measure_offline, measure_server
from mor.loading import CONFIG, find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "offline", "crowd"))
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the engine, alone and in the server")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    {"throughput": throughput, "offline": offline, "crowd": crowd}[arguments.what](arguments)


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    vocabulary = json.loads((find_model(arguments.model) / CONFIG).read_text())["vocab_size"]
    return make_prompts(arguments.requests, arguments.prompt, vocabulary)


def offline(arguments: argparse.Namespace) -> None:
    """One measurement of the engine alone, printed as two numbers."""
    import torch

    torch.set_num_threads(arguments.threads)
    found = measure_offline(arguments.model, prompts(arguments), tokens=arguments.tokens, streams=arguments.streams)
    print(found.tokens_per_second, found.engine_cpu)


def throughput(arguments: argparse.Namespace) -> None:
    """Alone and in the server by turns, so that other work on the machine strikes both."""
    print(
        f"{arguments.streams} streams, {arguments.requests} requests of {arguments.prompt} + {arguments.tokens} tokens"
    )
    ratios, rounds = list[float](), list[dict[str, Any]]()
    for _ in range(arguments.repeats):
        command = [sys.executable, "-m", "bench.serving", "offline", *sys.argv[2:]]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        alone, alone_cpu = map(float, said.split())
        served = measure_server(
            arguments.model,
            prompts(arguments),
            tokens=arguments.tokens,
            streams=arguments.streams,
            options=["--threads", str(arguments.threads)],
        )
        ratios.append(served.tokens_per_second / alone)
        rounds.append({"engine_tokens_per_second": alone, "engine_cpu_ms": alone_cpu, "server": asdict(served)})
        print(
            f"engine {alone:,.0f} tokens/s  server {served.tokens_per_second:,.0f} tokens/s  ratio {ratios[-1]:.2f}  "
            f"first token {1000 * (served.first_token or 0):.0f} ms (p99 {1000 * (served.first_token_99 or 0):.0f})  "
            f"between tokens {1000 * (served.gap or 0):.1f} ms\n"
            f"  processor time per token: engine alone {alone_cpu:.2f} ms, serving {served.engine_cpu:.2f} ms, "
            f"server {served.server_cpu:.2f} ms",
            flush=True,
        )
    median, load = statistics.median(ratios), os.getloadavg()[0]
    print(f"ratio, median: {median:.2f}; load of the machine: {load:.1f}")
    print(json.dumps(dict(benchmark="serving", ratio=median, ratios=ratios, load=load, rounds=rounds)))


def crowd(arguments: argparse.Namespace) -> None:
    """Well-behaved, malformed, huge, slow and vanishing clients at once."""
    report = asyncio.run(watch_crowd(arguments.model, num_clients=arguments.clients, seconds=arguments.seconds))
    for name, value in report.items():
        print(f"{name}: {value}")
    print(json.dumps(dict(benchmark="crowd", **report)))


if __name__ == "__main__":
    main()
