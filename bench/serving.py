"""The server measured: beside the engine alone, on an engine that costs nothing, under long prompts, and in a crowd.

python -m bench.serving throughput MODEL [--streams 32 --requests 128 --tokens 100 --prompt 32]
python -m bench.serving profile MODEL --profile FILE
python -m bench.serving stub [--streams 256 --requests 768 --tokens 256 --piece 8 --beat 0.02]
python -m bench.serving queue MODEL [--streams 8 --long 8 --long-prompt 1024 --seconds 20]
python -m bench.serving crowd MODEL [--clients 1000 --seconds 120]

MODEL is a folder, or an arm with random weights: `mor-3:360m`, `vanilla:small`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mor.benchmark.server_crowd import watch_crowd
from mor.benchmark.server_model import save_arm, text_tokenizer
from mor.benchmark.server_process import ProfiledSource
from mor.benchmark.server_queue import Waits, measure_queue
from mor.benchmark.server_throughput import Load, Measured, engine_options, measure_offline, measure_server
from mor.benchmark.stub_engine import VOCABULARY, StubSource
from mor.loading import CONFIG, find_model
from mor.serve.worker import EngineSource, ModelFolder
from mor.show.machine import describe_machine


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.what in SERVANTS:
        SERVANTS[arguments.what](arguments)
        return
    print(json.dumps(describe_machine(torch.device("cuda") if torch.cuda.is_available() else None)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if ":" in arguments.model:
            name, size = arguments.model.split(":")
            arguments.model = folder
            depth = save_arm(Path(folder), name, size, max_length=2048, mean_depth=arguments.mean_depth)
            arguments.mean_depth = depth
        found = MEASUREMENTS[arguments.what](arguments)
    print(json.dumps({"benchmark": f"serving {arguments.what}", "command": sys.argv[1:], **found}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*MEASUREMENTS, *SERVANTS))
    parser.add_argument("model", metavar="MODEL", nargs="?", default="")
    parser.add_argument("--streams", type=int, default=32, help="requests at a time")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument(
        "--tokens", type=int, default=100, help="of an output on average: from half to 1.5 times as many"
    )
    parser.add_argument("--mean-depth", type=float)
    parser.add_argument("--threads", type=int, default=1, help="of the engine on a CPU, alone and in the server")
    parser.add_argument("--kv-memory-gib", type=float, help="of the engine, alone and in the server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="of clients")
    parser.add_argument("--profile", metavar="FILE", help="where the server's process spends its time; slows it")
    parser.add_argument("--piece", type=int, default=8, help="tokens that a stream of the stub gets at a time")
    parser.add_argument("--beat", type=float, default=0.02, help="seconds between these times")
    parser.add_argument("--long", type=int, default=8, help="long prompts at a time")
    parser.add_argument("--long-prompt", type=int, default=1024, help="tokens of each")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=1000)
    return parser


def load_of(arguments: argparse.Namespace, vocab_size: int) -> Load:
    return Load.random(
        requests=arguments.requests,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        vocab_size=vocab_size,
        streams=arguments.streams,
        mean_depth=arguments.mean_depth,
    )


def vocabulary(model: str) -> int:
    return json.loads((find_model(model) / CONFIG).read_text())["vocab_size"]


def serve_command(arguments: argparse.Namespace, max_requests: int) -> list[str]:
    """A server of the model, watched by profilers if that is asked for."""
    watch = ["-m", "cProfile", "-o", f"{arguments.profile}.server"] if arguments.profile else []
    words = [f"--threads={arguments.threads}"]
    if arguments.kv_memory_gib is not None:
        words.append(f"--kv-memory-gib={arguments.kv_memory_gib}")
    profile = [f"--profile={arguments.profile}"] if arguments.profile else []
    command = ["-m", "bench.serving", "server", arguments.model, f"--streams={max_requests}"]
    return [sys.executable, *watch, *command, *words, *profile]


def server(arguments: argparse.Namespace) -> None:
    """As `mor serve`, with the options that the engine alone is measured with."""
    from mor.serve.chat import open_tokenizer

    source: EngineSource = ModelFolder(
        path=arguments.model,
        threads=arguments.threads,
        options=engine_options(arguments.streams, arguments.kv_memory_gib),
    )
    if arguments.profile:
        source = ProfiledSource(source=source, file=f"{arguments.profile}.engine")
    run_server(source, open_tokenizer(find_model(arguments.model)), arguments.streams)


def stub_server(arguments: argparse.Namespace) -> None:
    """The same of an engine that makes tokens up."""
    source = StubSource(piece=arguments.piece, beat=arguments.beat, max_requests=arguments.streams)
    run_server(source, text_tokenizer(VOCABULARY), arguments.streams)


def run_server(source: EngineSource, tokenizer: Any, max_running: int) -> None:
    from mor.serve.options import ServeOptions
    from mor.serve.run import serve
    from mor.serve.server import create_app

    options = ServeOptions(model_name="bench", port=0)
    asyncio.run(serve(create_app(source, tokenizer, options, max_running=max_running), options))


def throughput(arguments: argparse.Namespace) -> dict[str, object]:
    """The engine alone, then the server, on the same requests, by turns: other work on the machine strikes both."""
    load, rounds = load_of(arguments, vocabulary(arguments.model)), list[dict[str, Any]]()
    print(
        f"{arguments.streams} streams, {arguments.requests} requests of {arguments.prompt} + {arguments.tokens} tokens"
    )
    turns, each = (
        (1, arguments.rounds) if torch.cuda.is_available() else (arguments.rounds, 1)
    )  # there it starts slowly
    for _ in range(turns):
        began = time.monotonic()
        alone = _offline(arguments, each)
        print(f"the engine alone took {time.monotonic() - began:.0f} s with its start", flush=True)
        command = serve_command(arguments, arguments.streams)
        for engine, server in zip(
            alone, measure_server(command, load, processes=arguments.processes, rounds=each), strict=True
        ):
            ratio = server.tokens_per_second / engine.tokens_per_second
            rounds.append({"engine": asdict(engine), "server": asdict(server), "ratio": ratio})
            say("engine", engine)
            say("server", server)
            print(f"ratio {ratio:.2f}", flush=True)
    median, busy = statistics.median(found["ratio"] for found in rounds), os.getloadavg()[0]
    print(f"ratio, median: {median:.2f}; load of the machine: {busy:.1f}")
    return {"ratio": median, "load": busy, "rounds": rounds}


def profile(arguments: argparse.Namespace) -> dict[str, object]:
    """What takes the time of the server's process, and of the engine's."""
    load, command = load_of(arguments, vocabulary(arguments.model)), serve_command(arguments, arguments.streams)
    for measured in measure_server(command, load, processes=arguments.processes):
        say("server, slowed by profilers,", measured)
    for part in ("server", "engine"):
        show_profile(f"{arguments.profile}.{part}")
    return {}


def _offline(arguments: argparse.Namespace, rounds: int) -> list[Measured]:
    """The engine alone, in a process of its own."""
    names = "streams requests prompt tokens threads mean_depth kv_memory_gib".split()
    options = {name: getattr(arguments, name) for name in names}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "bench.serving", "offline", arguments.model, *words, f"--rounds={rounds}"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Measured(**measured) for measured in json.loads(said.splitlines()[-1])]


def offline(arguments: argparse.Namespace) -> None:
    """That process."""
    torch.set_num_threads(arguments.threads)
    load = load_of(arguments, vocabulary(arguments.model))
    options = engine_options(arguments.streams, arguments.kv_memory_gib)
    found = measure_offline(arguments.model, load, options, rounds=arguments.rounds)
    print(json.dumps([asdict(measured) for measured in found]))


def stub(arguments: argparse.Namespace) -> dict[str, object]:
    """The server alone, on an engine that makes tokens up."""
    watch = ["-m", "cProfile", "-o", arguments.profile] if arguments.profile else []
    options = [f"--{name}={getattr(arguments, name)}" for name in ("streams", "piece", "beat")]
    command = [sys.executable, *watch, "-m", "bench.serving", "stub-server", *options]
    load = load_of(arguments, VOCABULARY)
    found = measure_server(command, load, processes=arguments.processes, rounds=arguments.rounds)
    for measured in found:
        say("server", measured)
    if arguments.profile:
        show_profile(arguments.profile)
    return {"rounds": [asdict(measured) for measured in found]}


def say(name: str, measured: Measured) -> None:
    line = (
        f"{name} {measured.tokens_per_second:,.0f} tokens/s  processor per token: engine {measured.engine_cpu:.1f} us"
    )
    if measured.first_token is not None and measured.first_token_99 is not None:
        line += (
            f", server {measured.server_cpu:.1f} us  first token {1000 * measured.first_token:.0f} ms (p99 "
            f"{1000 * measured.first_token_99:.0f})  pieces of {measured.piece:.1f} tokens every "
            f"{1000 * (measured.gap or 0):.1f} ms (p99 {1000 * (measured.gap_99 or 0):.0f})"
        )
    print(line, flush=True)


def show_profile(file: str) -> None:
    """Where the time went, imports and waiting left out."""
    entries = pstats.Stats(file).stats.items()  # type: ignore[attr-defined]
    parts = (
        "uvicorn",
        "starlette",
        "fastapi",
        "mor/",
        "asyncio",
        "h11",
        "json",
        "pickle",
        "socket",
        "pydantic",
        "cuda",
    )
    rows = [
        (own, total, calls, f"{'/'.join(path.split('/')[-3:])}:{line} {name}")
        for (path, line, name), (_, calls, own, total, _) in entries
        if calls > 200 and any(part in f"{path} {name}" for part in parts) and "poll" not in name
    ]
    print("own s  with calls s   calls")
    for own, total, calls, name in sorted(rows, reverse=True)[:40]:
        print(f"{own:5.2f} {total:13.2f} {calls:7d}  {name}")


def queue(arguments: argparse.Namespace) -> dict[str, object]:
    """Short requests beside a queue of long prompts."""
    size = vocabulary(arguments.model)
    short = load_of(arguments, size)
    long = Load.random(
        requests=4 * arguments.long,
        prompt=arguments.long_prompt,
        tokens=16,
        vocab_size=size,
        streams=arguments.long,
        mean_depth=arguments.mean_depth,
        seed=1,
    )
    command = serve_command(arguments, arguments.streams + arguments.long)
    found = measure_queue(command, short, long, seconds=arguments.seconds)
    print(
        f"at any time {arguments.streams} requests of {arguments.prompt} + {arguments.tokens} tokens, alone and beside "
        f"{arguments.long} of {arguments.long_prompt} + 16; {arguments.seconds:g} s each"
    )
    for name, waits in (("short, alone", found.alone), ("short, beside", found.beside), ("long", found.long)):
        say_waits(name, waits)
    return asdict(found)


def say_waits(name: str, waits: Waits) -> None:
    print(
        f"{name:13} {waits.requests:6d} requests  prompts {waits.prompt_tokens_per_second:,.0f} tokens/s  outputs "
        f"{waits.tokens_per_second:,.0f} tokens/s  first token {1000 * waits.first_token:.0f} ms (p99 "
        f"{1000 * waits.first_token_99:.0f})  between pieces {1000 * waits.gap:.1f} ms (p99 {1000 * waits.gap_99:.0f})"
    )


def crowd(arguments: argparse.Namespace) -> dict[str, object]:
    """Well-behaved, malformed, huge, slow and vanishing clients at once."""
    report = asyncio.run(watch_crowd(arguments.model, num_clients=arguments.clients, seconds=arguments.seconds))
    for name, value in report.items():
        print(f"{name}: {value}")
    return report


MEASUREMENTS = {"throughput": throughput, "profile": profile, "stub": stub, "queue": queue, "crowd": crowd}
SERVANTS = {"offline": offline, "server": server, "stub-server": stub_server}

if __name__ == "__main__":
    main()
