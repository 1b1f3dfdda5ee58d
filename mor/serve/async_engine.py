"""The engine as the server's event loop sees it: streams of tokens, refusals, a crash and the restart after it.

Everything here runs in the event loop and never waits for the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mor.engine.params import SamplingParams
from mor.serve.errors import ApiError, engine_failed, engine_lost, invalid, named_field, overloaded, unavailable
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
    Submit,
    Unable,
)
from mor.serve.process import EngineProcess
from mor.serve.stream import Piece, Stream
from mor.serve.worker import EngineSource

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]


class Observer(Protocol):
    """Who counts: told of the model, of every sample's tokens as they come, and of the engine's load."""

    def opened(self, facts: ModelFacts) -> None: ...

    def heard(self, news: News, *, since_open: float, since_last: float | None) -> None:
        """`since_open`, `since_last`: seconds since the request was made, and since the sample's last news."""
        ...

    def loaded(self, load: Load) -> None: ...

    def restarted(self) -> None: ...


@dataclass(kw_only=True)
class _Submission:
    """One prompt of a stream: its choices begin with number `first`. `left`: how many of them go on."""

    stream: Stream
    first: int
    left: int
    opened: float
    samples: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Sample:
    """One choice of a stream while the engine works on it."""

    submission: _Submission
    choice: int
    last: float | None = None


class AsyncEngine:
    """An engine in a process of its own.

    `max_open`: samples that may run or wait at a time. `max_unread`: tokens that a request's reader may leave unread.
    `stall_seconds`: an engine that has work and says nothing for so long is given up and restarted. A process that
    ends by itself is started again once; when it ends again, `state` is "failed" for good.
    """

    def __init__(
        self,
        source: EngineSource,
        *,
        max_open: int,
        max_unread: int = 8192,
        max_restarts: int = 1,
        stall_seconds: float = 300.0,
        observer: Observer | None = None,
    ) -> None:
        self.state: State = "stopped"
        self.facts: ModelFacts | None = None
        self.load: Load | None = None
        self.reason: str | None = None  # why the engine failed
        self._source, self._observer = source, observer
        self._max_open, self._max_unread, self._stall_seconds = max_open, max_unread, stall_seconds
        self._restarts_left = max_restarts
        self._process: EngineProcess | None = None
        self._numbers = itertools.count()
        self._submissions: dict[str, _Submission] = {}
        self._samples: dict[str, _Sample] = {}
        self._streams: dict[Stream, list[str]] = {}
        self._num_open = 0
        self._last_heard = 0.0
        self._watcher: asyncio.Task[None] | None = None
        self._waiters: set[asyncio.Event] = set()

    @property
    def num_open(self) -> int:
        """Samples running or waiting."""
        return self._num_open

    @property
    def pid(self) -> int | None:
        """The engine's process, if there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process; `state` says how far it is."""
        assert self.state == "stopped" and self._process is None
        self._set_state("starting")
        self._launch()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def until(self, *states: State) -> State:
        """Wait for one of `states`."""
        changed = asyncio.Event()
        self._waiters.add(changed)
        try:
            while self.state not in states:
                changed.clear()
                await changed.wait()
        finally:
            self._waiters.discard(changed)
        return self.state

    def drain(self) -> None:
        """Take no more requests; go on with those that are open."""
        if self.state not in ("failed", "stopped"):
            self._set_state("draining")

    async def until_idle(self, seconds: float) -> bool:
        """Wait for the last open request to end, at most so long. Whether it did."""
        end = time.monotonic() + seconds
        while self._streams and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._streams

    def give_up(self) -> None:
        """What is open fails."""
        self._fail_all(unavailable("stopping"))

    async def stop(self) -> None:
        """End the process; what is open fails."""
        listens = self.state in ("ready", "draining") and self.facts is not None
        self._set_state("stopped")
        process, self._process = self._process, None
        self.give_up()
        if self._watcher is not None:
            self._watcher.cancel()
        if process is not None:
            await process.stop(listens=listens)

    # Requests

    def open(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Stream:
        """Ask for `params.n` choices after each prompt; choice c of prompt p is number p * n + c.

        Raises ApiError when the engine cannot take more, or nothing at all.
        """
        num_choices = len(prompts) * params.n
        self._admit(num_choices)
        stream = Stream(num_choices, max_unread=self._max_unread, closed=self._close)
        self._streams[stream], self._num_open = [], self._num_open + num_choices
        now = time.monotonic()
        for number, prompt in enumerate(prompts):
            name = f"r{next(self._numbers)}"
            self._streams[stream].append(name)
            self._submissions[name] = _Submission(stream=stream, first=number * params.n, left=params.n, opened=now)
            self._send(Submit(id=name, prompt=tuple(prompt), params=params))
        return stream

    def _admit(self, count: int) -> None:
        if self.state != "ready":
            raise unavailable(self.state)
        if count > self._max_open:
            raise invalid(f"n: {count} samples are more than the {self._max_open} that may run or wait", "n")
        if self._num_open + count > self._max_open:
            raise overloaded(self._max_open)
        if not self._submissions:
            self._last_heard = time.monotonic()  # it was silent because it had nothing to do

    def _close(self, stream: Stream) -> None:
        """Called by a stream that is over, or whose reader is gone: what is left of it is aborted."""
        for name in self._streams.pop(stream):
            submission = self._submissions.pop(name)
            self._num_open -= submission.left
            for sample in submission.samples:
                self._samples.pop(sample, None)
            if submission.left:
                self._send(Abort(id=name))

    def _send(self, message: Submit | Abort) -> None:
        if self._process is not None:
            self._process.send(message)

    # What the engine says

    def _hear(self, message: FromEngine) -> None:
        self._last_heard = time.monotonic()
        match message:
            case Ready():
                self.facts = message.facts
                if self._observer is not None:
                    self._observer.opened(message.facts)
                if self.state in ("starting", "restarting"):
                    self._set_state("ready")
            case Unable():
                self.reason = message.reason
            case Accepted():
                self._accept(message)
            case Refused():
                self._refuse(message)
            case Progress():
                self._progress(message)

    def _accept(self, message: Accepted) -> None:
        submission = self._submissions.get(message.id)
        if submission is None:
            return  # aborted meanwhile
        submission.samples = message.samples
        for number, sample in enumerate(message.samples):
            choice = submission.first + number
            self._samples[sample] = _Sample(submission=submission, choice=choice)
        if all(self._submissions[name].samples for name in self._streams[submission.stream]):
            submission.stream.accept()

    def _refuse(self, message: Refused) -> None:
        text = _without_name(message.reason)
        if message.id in self._submissions:
            self._submissions[message.id].stream.fail(invalid(text, named_field(text)))

    def _progress(self, message: Progress) -> None:
        self.load = message.load
        for news in message.news:
            sample = self._samples.get(news.id)
            if sample is not None:
                self._tell(sample, news)
        if self._observer is not None:
            self._observer.loaded(message.load)

    def _tell(self, sample: _Sample, news: News) -> None:
        now = self._last_heard
        if self._observer is not None:
            since_last = None if sample.last is None else now - sample.last
            self._observer.heard(news, since_open=now - sample.submission.opened, since_last=since_last)
        sample.last = now
        if news.finished:
            del self._samples[news.id]
            sample.submission.left -= 1
            self._num_open -= 1
        stream = sample.submission.stream
        if news.error is not None:
            logger.error("the engine failed on a request: %s", news.error)
            stream.fail(engine_failed())
        else:
            stream.feed(Piece(choice=sample.choice, news=news))

    # The process

    def _launch(self) -> None:
        self._last_heard = time.monotonic()
        self._process = EngineProcess(self._source, hear=self._hear, ended=self._ended)

    def _ended(self, process: EngineProcess) -> None:
        if process is not self._process:
            return  # it was stopped
        self._process = None
        was_ready = self.facts is not None
        logger.error("the engine's process ended: %s", self.reason or "it crashed")
        can_restart = was_ready and self._restarts_left > 0 and self.state != "draining"
        self._set_state("restarting" if can_restart else "failed")
        self._fail_all(engine_lost())
        if can_restart:
            self._restarts_left -= 1
            if self._observer is not None:
                self._observer.restarted()
            self._launch()

    def _fail_all(self, error: ApiError) -> None:
        for stream in tuple(self._streams):
            stream.fail(error)

    async def _watch(self) -> None:
        """Give up an engine that has work and is silent."""
        while True:
            await asyncio.sleep(min(1.0, self._stall_seconds / 4))
            silent = time.monotonic() - self._last_heard
            if self._process is not None and self._submissions and silent > self._stall_seconds:
                logger.error("the engine has been silent for %.0f s; it is ended", silent)
                self._process.kill()

    def _set_state(self, state: State) -> None:
        if state != self.state:
            logger.info("the engine is %s", state)
            self.state = state
            for waiter in self._waiters:
                waiter.set()


def _without_name(reason: str) -> str:
    """The engine's words without the name that the request has inside."""
    return re.sub(r"^request '\w+'", "the request", reason)
