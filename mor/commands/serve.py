"""Serve a model over HTTP: OpenAI's interface with a compute dial, and a page on which to see each token's depth."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from mor.commands.common import add_device
from mor.loading import find_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mor.serve.options import ServeOptions
    from mor.serve.worker import ModelFolder

KEY_VARIABLE = "MOR_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or folder of a run")
    where = parser.add_argument_group("where and who")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    where.add_argument("--port", type=int, default=8000, metavar="N", help="port (default 8000; 0: any)")
    where.add_argument("--name", metavar="NAME", help="what requests call the model (default: its folder's name)")
    where.add_argument("--api-key", metavar="KEY", help=f"requests must bear it (default: ${KEY_VARIABLE}, if set)")
    where.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin ask; repeatable"
    )
    where.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's own")
    where.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="of one output (default: what the model leaves)")
    limits.add_argument("--max-choices", type=int, default=128, metavar="N", help="prompts times n (default 128)")
    limits.add_argument("--max-waiting", type=int, default=1024, metavar="N", help="samples that wait (default 1024)")
    limits.add_argument("--max-connections", type=int, default=4096, metavar="N", help="clients (default 4096)")
    limits.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help="to end after SIGTERM (30)")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-requests", type=int, default=256, metavar="N", help="samples that run (default 256)")
    engine.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and output (default: the model's)"
    )
    engine.add_argument("--kv-memory-gib", type=float, metavar="G", help="memory of keys and values")
    engine.add_argument(
        "--prefill-chunk", type=int, metavar="N", help="prompt tokens at a time (default 256, on CUDA 1024)"
    )
    engine.add_argument(
        "--max-visit-tokens", type=int, metavar="N", help="tokens of a visit (default 512, on CUDA 4096 of prompts)"
    )
    engine.add_argument("--no-prefix-caching", action="store_true", help="forget prompts when they end")
    engine.add_argument("--threads", type=int, metavar="N", help="threads of the engine on a CPU (default: torch's)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: pip install 'mor[serve]'") from None
    import asyncio
    import warnings

    from mor.engine.options import EngineOptions
    from mor.serve.options import ServeOptions
    from mor.serve.run import serve
    from mor.serve.worker import ModelFolder

    engine = EngineOptions(
        max_requests=arguments.max_requests,
        max_length=arguments.max_length,
        kv_memory_gib=arguments.kv_memory_gib,
        prefill_chunk=arguments.prefill_chunk,
        max_visit_tokens=arguments.max_visit_tokens,
        prefix_caching=not arguments.no_prefix_caching,
    )
    source = ModelFolder(
        path=str(find_model(arguments.model)), device=arguments.device, threads=arguments.threads, options=engine
    )
    options = ServeOptions(
        model_name=arguments.name or ModelFolder(path=arguments.model).name,
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
        cors_origins=tuple(arguments.cors_origin),
        max_tokens=arguments.max_tokens,
        max_choices=arguments.max_choices,
        max_waiting=arguments.max_waiting,
        max_connections=arguments.max_connections,
        drain_seconds=arguments.drain_seconds,
    )
    if options.is_public and options.api_key is None:
        warnings.warn(f"{options.host} can be reached by other machines, and no --api-key is asked for", stacklevel=1)
    app = _create_app(source, options, arguments.chat_template)
    asyncio.run(serve(app, options, log_level=arguments.log_level))


def _create_app(source: ModelFolder, options: ServeOptions, template: str | None) -> FastAPI:
    """Load the tokenizer alone: the model belongs to the engine's process."""
    from mor.serve.chat import open_tokenizer, read_template
    from mor.serve.server import create_app

    text = None if template is None else read_template(template)
    tokenizer = open_tokenizer(source.path)
    return create_app(source, tokenizer, options, max_running=source.options.max_requests, template=text)
