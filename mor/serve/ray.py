"""A model as a Ray Serve application: as many replicas as asked for, each with an engine of its own.

serve run mor.serve.ray:app model=PATH replicas=2 gpus=1
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mor.engine.options import EngineOptions
from mor.loading import find_model
from mor.serve.chat import open_tokenizer, read_template
from mor.serve.options import ServeOptions
from mor.serve.server import create_app
from mor.serve.worker import ModelFolder

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application  # type: ignore[import-not-found]


class Arguments(BaseModel):
    """What `serve run` takes as `name=value`.

    `model`: a model folder, a run or a demo, at the same place on every machine. `replicas`: how many. `gpus`: of one
    replica. `threads`: of its engine on a CPU. `max_requests`: samples that run at a time in one replica. The rest as
    `mor serve` has it.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    replicas: int = 1
    gpus: float = 0
    threads: int | None = None
    device: str = "auto"
    max_requests: int = 256
    max_waiting: int = 1024
    max_tokens: int | None = None
    api_key: str | None = None
    chat_template: str | None = None


def app(words: dict[str, str]) -> Application:
    """The application that the `name=value` words of `serve run` describe, as in `Arguments`.

    Raises FileNotFoundError or ValueError for words that make no sense, or a model that is not there.
    """
    try:
        from ray import serve  # type: ignore[import-not-found, attr-defined]
    except ImportError:
        raise ImportError("this needs Ray Serve: pip install 'ray[serve]'") from None
    arguments = Arguments.model_validate(words)
    find_model(arguments.model)

    def build() -> FastAPI:
        return build_app(arguments)

    @serve.deployment(
        name="mor",
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_requests + arguments.max_waiting,
        ray_actor_options={"num_gpus": arguments.gpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
    )
    @serve.ingress(build)
    class Replica:
        """The whole server, less its sockets: those are Ray's."""

        async def check_health(self) -> None:
            """Ray replaces a replica whose engine failed for good."""
            application: Any = self.app  # type: ignore[attr-defined]  # set by `ingress`
            if application.state.service.engine.state == "failed":
                raise RuntimeError("the engine failed")

    return Replica.bind()  # type: ignore[attr-defined]


def build_app(arguments: Arguments) -> FastAPI:
    """The application of one replica."""
    folder = find_model(arguments.model)
    source = ModelFolder(
        path=str(folder),
        device=arguments.device,
        threads=arguments.threads,
        options=EngineOptions(max_requests=arguments.max_requests),
    )
    options = ServeOptions(
        model_name=arguments.name or ModelFolder(path=arguments.model).name,
        api_key=arguments.api_key,
        max_waiting=arguments.max_waiting,
        max_tokens=arguments.max_tokens,
    )
    template = None if arguments.chat_template is None else read_template(arguments.chat_template)
    return create_app(
        source,
        open_tokenizer(folder),
        options,
        max_running=arguments.max_requests,
        template=template,
        waits_for_model=True,
    )
