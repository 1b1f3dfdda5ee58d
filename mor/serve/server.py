"""The application: routes of OpenAI's interface, health, metrics, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mor import __version__
from mor.serve.async_engine import AsyncEngine
from mor.serve.chat import TextCoder
from mor.serve.errors import ApiError, ErrorReply, invalid, unavailable
from mor.serve.metrics import Metrics
from mor.serve.middleware import Guard, JsonResponse, error_response
from mor.serve.options import ServeOptions
from mor.serve.page import page_routes
from mor.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    validation_error,
)
from mor.serve.replies import ChatCompletion, Completion, DecodedText, Health, ModelCard, ModelList, Tokens
from mor.serve.responses import ClientGone
from mor.serve.service import Service
from mor.serve.worker import EngineSource


def create_app(
    source: EngineSource,
    tokenizer: Any,
    options: ServeOptions,
    *,
    max_running: int,
    template: str | None = None,
    waits_for_model: bool = False,
) -> FastAPI:
    """The application; its engine starts and ends with it.

    `tokenizer`: the model's. `max_running`: samples that the engine runs at a time. `template`: a chat template in
    place of the tokenizer's own. `waits_for_model`: it starts only when the model is loaded, instead of answering 503
    until then. `app.state.service` holds the parts.
    """
    metrics = Metrics()
    engine = AsyncEngine(
        source, max_open=max_running + options.max_waiting, max_unread=options.max_unread, observer=metrics
    )
    service = Service(engine, TextCoder(tokenizer, template=template), options, metrics)
    app = FastAPI(
        title="mor",
        version=__version__,
        summary="Mixture-of-Recursions language models behind OpenAI's interface",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(service, waits_for_model),
    )
    app.state.service = service
    _add_routes(app, service)
    app.router.routes += page_routes(service)
    _add_error_handlers(app)
    app.openapi = lambda: _describe(app)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(
        Guard,
        metrics=metrics,
        known_paths=paths,
        options=options,
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's clients send some of their own
            expose_headers=["Retry-After"],
        )
    return app


def _lifespan(service: Service, waits_for_model: bool) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        try:
            if waits_for_model and await service.engine.until("ready", "failed") == "failed":
                raise RuntimeError(service.engine.reason or "the engine crashed while it started")
            yield
        finally:
            await service.engine.stop()
            service.coder.close()

    return lifespan


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in statuses}


def _add_routes(app: FastAPI, service: Service) -> None:
    refusals = _errors(400, 401, 403, 404, 408, 413, 429, 500, 503)
    streamed = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}

    @app.post("/v1/completions", response_model=Completion, responses={200: streamed, **refusals})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text after a prompt."""
        return await service.complete(body, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: streamed, **refusals})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The next turn of a chat."""
        return await service.chat(body, request)

    @app.get("/v1/models", responses=_errors(401, 403, 503))
    async def models() -> ModelList:
        """The one model there is."""
        return ModelList(object="list", data=[service.model_card()])

    @app.get("/v1/models/{name:path}", responses=_errors(401, 403, 404, 503))
    async def model(name: str) -> ModelCard:
        """A model by its name."""
        service.check_model(name)
        return service.model_card()

    @app.post("/tokenize", responses=_errors(400, 401, 403, 404, 408, 413, 500, 503))
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """A text or a chat as token ids."""
        service.check_model(body.model)
        limit = service.facts.max_length
        if body.messages is not None:
            tokens = await service.coder.encode_chat(body.messages)
        else:
            tokens = await service.coder.encode(body.prompt) if body.prompt else []
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=limit)

    @app.post("/detokenize", responses=_errors(400, 401, 403, 404, 408, 413, 500))
    async def detokenize(body: DetokenizeRequest) -> DecodedText:
        """Token ids as text."""
        service.check_model(body.model)
        return DecodedText(prompt=await service.coder.decode(body.tokens))

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 when requests can be answered, else 503."""
        state = service.engine.state
        headers = {} if state == "ready" else unavailable(state).headers()
        return JsonResponse({"status": state}, status_code=200 if state == "ready" else 503, headers=headers)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_errors(401, 403)})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        service.metrics.ready.set(service.engine.state == "ready")
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(_as_api_error(request, error))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it; logs tell it from success


def _as_api_error(request: Request, error: HTTPException) -> ApiError:
    cause = error.__cause__
    if isinstance(cause, ApiError):  # raised while the body was read
        return cause
    if isinstance(cause, UnicodeDecodeError):
        return invalid("the body is not valid UTF-8", code="invalid_utf8")
    if isinstance(cause, RecursionError):
        return invalid("the body is nested too deeply", code="invalid_json")
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this path", code="not_found")
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        return ApiError(405, f"{request.method} is not served at this path", code="method_not_allowed", allow=allow)
    return ApiError(error.status_code, "the body cannot be read as JSON", code="invalid_json")


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, less the errors that this server does not answer with."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for operation in (item for path in document["paths"].values() for item in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
