"""The engine in a process of its own: takes requests between visits and tells what each visit brought."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Protocol

from mor.engine.options import EngineOptions
from mor.serve.messages import (
    Abort,
    Accepted,
    FromEngine,
    Load,
    ModelFacts,
    News,
    Progress,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    Token,
    Unable,
)
from mor.serve.wire import Wire

if TYPE_CHECKING:
    from mor.engine.engine import Engine
    from mor.engine.outputs import RequestOutput, TokenOutput

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Visits that may fail one after the other; then something is broken that only a new process mends."""


class EngineSource(Protocol):
    """Where the engine comes from. It is pickled, and opened in the new process."""

    def open(self) -> Engine: ...


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The model at `path`: a model folder, a run or a demo."""

    path: str
    device: str = "auto"
    threads: int | None = None
    options: EngineOptions = field(default_factory=EngineOptions)

    @property
    def name(self) -> str:
        """What to call the model: by the run it belongs to."""
        folder = Path(self.path).resolve()
        while folder.name in ("final", "checkpoints") or folder.name.startswith("step-"):
            folder = folder.parent
        return folder.name or "mor"

    def open(self) -> Engine:
        """Load it. Raises FileNotFoundError or ValueError naming what is missing or wrong."""
        import torch

        from mor.engine.engine import Engine

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Engine.from_pretrained(self.path, device=self.device, options=self.options)


def run_worker(source: EngineSource, end: socket) -> None:
    """The process's main function; ends when the other end says so or is gone."""
    wire = Wire(end)
    for number in (signal.SIGINT, signal.SIGTERM):  # the server hears these too, and says when to stop
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = source.open()
        engine.warm_up()
        gc.freeze()  # or every thorough collection would go through all that was imported, while requests wait
        worker = Worker(engine, wire)
        wire.send(Ready(facts=model_facts(engine)))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        wire.send(Unable(reason=str(error) or type(error).__name__))
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        worker.run()


def model_facts(engine: Engine) -> ModelFacts:
    """What a server must know of the engine's model."""
    from mor.model.cost import kv_bytes

    config = engine.model.config
    depths, size = range(1, config.num_recursions + 1), engine.model.dtype.itemsize
    active = [[1] * depth + [0] * (config.num_recursions - depth) for depth in depths]
    has_dial = _has_dial(engine)
    return ModelFacts(
        vocab_size=config.vocab_size,
        max_length=engine.scheduler.limits.max_length,
        num_recursions=config.num_recursions,
        has_dial=has_dial,
        mean_depth=config.mean_depth if has_dial else None,
        kv_bytes=tuple(kv_bytes(config, counts, size, num_tokens=1) for counts in active),
        num_pages=engine.pool.num_pages,
    )


def _has_dial(engine: Engine) -> bool:
    """Whether requests may ask for a mean depth: the model has a router, and it was calibrated."""
    from mor.engine.budgets import Budgets

    try:
        Budgets(engine.model.model.recursion.router, engine.model.config.depth_plan).check((1.0, None))
    except ValueError:
        return False
    return engine.model.config.num_recursions > 1


class Worker:
    """Steps an engine while it has requests, and listens in between."""

    def __init__(self, engine: Engine, wire: Wire) -> None:
        self._engine, self._wire = engine, wire
        self._samples: dict[str, set[str]] = {}  # of each live id
        self._ids: dict[str, str] = {}  # of each live sample
        self._failures = 0

    def run(self) -> None:
        """Until told to stop. Raises EOFError or OSError when the other end is gone."""
        while self._listen():
            if self._engine.has_unfinished:
                self._visit()

    def _listen(self) -> bool:
        """Take what was sent, waiting for it only when there is nothing to do. False when told to stop."""
        while not self._engine.has_unfinished or self._wire.poll():
            while not self._engine.has_unfinished and not self._wire.poll() and self._engine.warm_up_one():
                pass
            message: ToEngine = self._wire.receive()
            match message:
                case Submit():
                    self._submit(message)
                case Abort():
                    self._abort(message.id)
                case Stop():
                    return False
        return True

    def _submit(self, message: Submit) -> None:
        try:
            samples = tuple(self._engine.add_request(message.id, message.prompt, message.params))
        except (ValueError, RuntimeError) as error:
            self._say(Refused(id=message.id, reason=str(error)))
            return
        self._samples[message.id] = set(samples)
        self._ids |= dict.fromkeys(samples, message.id)
        self._say(Accepted(id=message.id, samples=samples))

    def _abort(self, name: str) -> None:
        for sample in self._samples.pop(name, ()):
            self._engine.abort(sample)
            self._ids.pop(sample, None)
        if not self._engine.has_unfinished:
            self._say(Progress(news=(), load=self._load()))

    def _visit(self) -> None:
        try:
            news = tuple(map(_news, self._engine.step()))
        except Exception:
            self._failures += 1
            logger.exception("a visit failed (%d in a row)", self._failures)
            if self._failures >= MOST_FAILURES:
                raise
            return
        for sample in news:
            if sample.error is None:
                self._failures = 0
            if sample.finished:
                self._forget(sample.id)
        if news:
            self._say(Progress(news=news, load=self._load()))

    def _forget(self, sample: str) -> None:
        name = self._ids.pop(sample)
        self._samples[name].discard(sample)
        if not self._samples[name]:
            del self._samples[name]

    def _load(self) -> Load:
        scheduler, statistics = self._engine.scheduler, self._engine.statistics
        return Load(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_free=self._engine.pool.num_free,
            visits=statistics.visits,
            rows=statistics.rows,
            preemptions=statistics.preemptions,
        )

    def _say(self, message: FromEngine) -> None:
        self._wire.send(message)


def _news(output: RequestOutput) -> News:
    """What the engine says of a sample, as it travels."""
    return News(
        id=output.id,
        prompt_tokens=output.prompt_tokens,
        cached_tokens=output.cached_tokens,
        text=output.text,
        depths=tuple(output.depths),
        tokens=tuple(map(_token, output.tokens)) if output.has_logprobs else (),
        finish_reason=output.finish_reason,
        error=output.error,
        scores=tuple(output.prompt_scores or ()) if output.start == 0 else (),
    )


def _token(token: TokenOutput) -> Token:
    assert token.logprob is not None
    return Token(token.token, token.offset, token.logprob, token.top_logprobs, token.depth)
