"""The engine: requests in, tokens out, with continuous depth-wise batching.

Every visit applies the shared block once to every live sequence, at whatever recursion it is; those that finish a token
get the head and start the next; nobody waits for another's depth.
"""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.engine.beside import Beside
from mor.engine.block_pool import BlockPool
from mor.engine.collecting import collecting_later
from mor.engine.detokenizer import Detokenizer
from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.layers import Layers
from mor.engine.native.few_rows import few_rows_for
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput, TokenLog
from mor.engine.params import SamplingParams
from mor.engine.prefix_cache import PrefixCache
from mor.engine.progress import GenerationBar, Statistics
from mor.engine.prompt_ids import Prompt, prompt_ids
from mor.engine.request import FinishReason, Request, TokenScore, Top
from mor.engine.runner import Runner
from mor.engine.sampler import Sampled, SamplingRow, sample
from mor.engine.scheduler import Plan, Scheduler
from mor.engine.setup import check_weights, choose_num_pages, end_tokens, limits_of, ops_for, slots_of
from mor.engine.slot_runner import Progress
from mor.engine.slot_state import SlotRow
from mor.engine.slots import Slots, fits_slot
from mor.loading import load_model
from mor.model.modeling_mor import MorForCausalLM


@dataclass(kw_only=True, eq=False, slots=True)
class _Live:
    """A request while it runs: what it said so far, how much of that was told, and the tokens that end it."""

    request: Request
    seed: int
    log: TokenLog
    ends: frozenset[int]
    told: int = 0
    error: str | None = None


class Engine:
    """Generates for many requests at once. Offline: `generate`. Online: `add_request`, then `step` while
    `has_unfinished`; `abort` at any time. It sees the model trained on, but prefixes and budgets that it knows stay as
    they were; once weights are replaced (`model.to`), it refuses requests: build another engine after either."""

    def __init__(self, model: MorForCausalLM, tokenizer: Any, options: EngineOptions | None = None) -> None:
        self.options = EngineOptions() if options is None else options
        self.model, self.tokenizer = model.eval(), tokenizer
        layout = PageLayout.of(model.config, self.options.page_entries)
        num_pages = choose_num_pages(self.options, layout.page_bytes(model.dtype), model.device)
        self._store = KvStore(layout, num_pages, device=model.device, dtype=model.dtype)
        few_rows = few_rows_for(model.config, model.device, model.dtype, self.options.native)
        layers = Layers(model.config, ops_for(model.device, layout.head_size), few_rows)
        self.runner = Runner(model, layout, self._store, layers)
        self.pool = BlockPool(num_pages)
        self.prefixes = PrefixCache(self.pool, layout.shape) if self.options.prefix_caching else None
        limits = limits_of(self.options, model)
        self.scheduler = Scheduler(shape=layout.shape, limits=limits, pool=self.pool, prefix_cache=self.prefixes)
        self.slots = slots_of(model, layout, self._store, self.runner.budgets, layers, self.options, limits)
        self._beside = Beside(model.device)
        self.statistics = Statistics()
        self._live: dict[str, _Live] = {}
        self._news: dict[str, _Live] = {}
        self._seeds = random.Random(self.options.seed)
        self._end_of_text = end_tokens(model, tokenizer)
        self._embedding_VD = model.model.embed_tokens.weight.detach()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto", options: EngineOptions | None = None) -> Engine:
        """An engine on the model and tokenizer at `path`: a model folder, a run, or a demo.

        Raises FileNotFoundError or ValueError naming what is missing or wrong.
        """
        return cls(*load_model(path, device=device), options)

    def warm_up(self) -> None:
        """Prepare what the first requests would otherwise wait for: compile, and capture visits that serve any number
        of requests. Takes seconds on CUDA."""
        if self.slots is not None:
            self.slots.warm_up_usual()
        self.warm_up_prompts()

    def warm_up_prompts(self) -> None:
        """Take in prompts of few tokens and of more, which compiles what planned visits need. Raises ValueError while
        requests are unfinished."""
        most = min(self.scheduler.limits.max_length - 1, self.scheduler.shape.most_tokens(self.pool.num_pages))
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, seed=0)
        for size in sorted({min(size, most) for size in (2, 9, self.runner.few_rows + 3)} - {0}):
            self.generate([[0] * size], params, progress=False)
        if self.prefixes is not None:
            self.prefixes.clear()
        self.statistics = Statistics()

    def warm_up_one(self) -> bool:
        """While no request runs: capture one more visit, that past requests would have been served better by. False if
        there is none. Takes a fraction of a second."""
        return self.slots is not None and not self.has_unfinished and self.slots.warm_up_one()

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._live)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> list[str]:
        """Queue a prompt, a text or its token ids. Returns the ids of its samples: `request_id` itself, or with n > 1
        `request_id-0`, `request_id-1`, ...

        Raises ValueError naming what is wrong or too long; then nothing is queued.
        """
        check_weights(self.model, self._embedding_VD)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"params={reprlib.repr(params)} must be SamplingParams")
        ids = prompt_ids(prompt, self.tokenizer, self.model.config.vocab_size)
        self.runner.budgets.check(params.budget)
        params.check_vocabulary(self.model.config.vocab_size)
        names = [request_id] if params.n == 1 else [f"{request_id}-{number}" for number in range(params.n)]
        in_slot = self.slots is not None and fits_slot(params)
        requests = [Request(id=name, prompt=ids, params=params, in_slot=in_slot) for name in names]
        self._queue(requests)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_of_text)
        make_text = partial(Detokenizer, self.tokenizer, params.stop, prompt=ids, min_tokens=params.min_tokens)
        for number, request in enumerate(requests):
            log = TokenLog(make_text)
            self._live[request.id] = _Live(request=request, seed=seed + number, log=log, ends=ends)
        return names

    def _queue(self, requests: Sequence[Request]) -> None:
        """All of them or none."""
        for number, request in enumerate(requests):
            try:
                self.scheduler.add(request)
            except Exception:
                for queued in requests[:number]:
                    self.scheduler.abort(queued.id)
                raise

    def abort(self, request_id: str) -> bool:
        """End a request at once; its pages are free. False if there is none of this id."""
        self._live.pop(request_id, None)
        return self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """A batch of visits of the slots if there are any, and a planned visit, or more if it leaves time for them.
        Returns what is new: of every request that got a token or ended, its tokens since the last time.

        What a visit raises is raised here. The requests that took part have then failed, as the next step says; it also
        says what was new of others.
        """
        with collecting_later():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        slots = self.slots
        plan = self.scheduler.plan() if slots is None else self.scheduler.plan(slots.ahead, slots.least_ahead)
        self.statistics.add(preemptions=len(plan.preempted))
        queued = self._queue_slots(plan) if slots is not None else 0
        self._visit(plan)
        if slots is not None:
            self._visits_meanwhile(slots)
            # On CUDA the batch just queued runs on while the one before is read; a CPU has done it by now.
            while slots.in_flight > (slots.runs_ahead and queued > 0):
                self._collect(plan)
        news, self._news = self._news, {}
        return [self._tell(live) for live in news.values() if self._live.get(live.request.id) is live]

    def _queue_slots(self, plan: Plan) -> int:
        """Let the slots go on; returns how many visits were queued."""
        assert self.slots is not None
        with self._failing(plan.decoding, self.slots.forget):
            self._beside.join()
            visits = self.slots.run(plan.decoding, plan.grown, self._slot_row, plan.ahead)
            self._beside.start(after_slots=self.slots.has_strays)
        self.statistics.add(visits=visits, rows=self.slots.last_rows if visits else 0)
        return visits

    def _visits_meanwhile(self, slots: Slots) -> None:
        """Planned visits while the slots are busy: a prompt then takes its recursions during one batch of theirs."""
        with slots.sparing():
            while slots.is_busy and ((plan := self.scheduler.plan()).segments or plan.copies):
                self.statistics.add(preemptions=len(plan.preempted))
                self._beside.start(after_slots=bool(plan.preempted))  # whose pages batches in flight may still write
                self._visit(plan)

    def _slot_row(self, request: Request, slot: int) -> SlotRow:
        assert self.slots is not None
        live = self._live[request.id]
        return self.slots.row(request, slot, seed=live.seed, ends=live.ends)

    def _collect(self, plan: Plan) -> None:
        """Take in what the oldest batch of the slots did."""
        assert self.slots is not None
        with self._failing(plan.decoding, self.slots.forget):
            self.statistics.add(tokens=sum([self._take_progress(progress) for progress in self.slots.collect()]))

    def _take_progress(self, progress: Progress) -> int:
        """Take in what a batch did for a request; returns how many tokens."""
        request, tokens, depths, logprobs, lengths, is_broken = progress
        live = self._live[request.id]
        reason = self._hear(live, tokens, depths, logprobs)
        self.scheduler.advance(request, tokens, depths, lengths)
        if reason is not None:
            self.scheduler.finish(request, reason)
        elif is_broken:
            self._break(live, "the logits hold NaN or infinity, or leave no token to choose")
        if tokens or is_broken:
            self._news[request.id] = live
        return len(tokens)

    @contextmanager
    def _failing(self, requests: Sequence[Request], forget: Callable[[], None]) -> Iterator[None]:
        """End these requests if what is done with them breaks off, and `forget` how far they came."""
        try:
            yield
        except BaseException as error:
            forget()
            for request in requests:
                live = self._live[request.id]
                if request.state != "finished":
                    live.error = f"{type(error).__name__}: {error}"
                    self.scheduler.finish(request, "error")
                self._news[request.id] = live
            raise

    def _visit(self, plan: Plan) -> None:
        if not plan.segments and not plan.copies:
            return
        visited = [segment.request for segment in plan.segments]
        with self._failing(visited, self.runner.forget), self._beside.running():
            self._store.copy_pages([copy.source for copy in plan.copies], [copy.target for copy in plan.copies])
            results = self.runner.visit(plan.segments) if plan.segments else []
            done: list[tuple[_Live, int, Tensor]] = []
            for segment, result in zip(plan.segments, results, strict=True):
                live, logits_V = self._live[segment.request.id], self.runner.take_logits(segment)
                self.scheduler.complete(segment, result)
                if self._ends_unsampled(live, result.scores):
                    self._news[live.request.id] = live
                elif logits_V is not None:
                    done.append((live, result.depths[-1], logits_V))
            self.statistics.add(visits=1, rows=plan.num_tokens)
            self._sample(done)

    def _ends_unsampled(self, live: _Live, scores: Sequence[TokenScore]) -> bool:
        """Whether a request ends without another token: its prompt was all there was to score, or cannot be scored."""
        request = live.request
        if not all(math.isfinite(score.logprob) for score in scores):
            self._break(live, "the logits of the prompt hold NaN or infinity")
        elif not request.params.generates and request.num_computed == request.num_known:
            live.log.end(hide_last=False)
            self.scheduler.finish(request, "length")
        return request.state == "finished"

    def _sample(self, done: Sequence[tuple[_Live, int, Tensor]]) -> None:
        if not done:
            return
        sampled = sample(torch.stack([logits_V for *_, logits_V in done]), [self._row(live) for live, *_ in done])
        for (live, depth, _), token in zip(done, sampled, strict=True):
            self._take(live, token, depth)
            self._news[live.request.id] = live
        self.statistics.add(tokens=len(done))

    def _row(self, live: _Live) -> SamplingRow:
        request = live.request
        is_early = len(request.output) < request.params.min_tokens
        return SamplingRow(
            params=request.params,
            seed=live.seed,
            index=len(request.output),
            prompt=request.prompt,
            output=request.output,
            banned=tuple(sorted(live.ends)) if is_early else (),
        )

    def _take(self, live: _Live, sampled: Sampled, depth: int) -> None:
        """Add a token to its request, and end the request if this was its last."""
        if sampled.error is not None:
            self._break(live, sampled.error)
            return
        logprobs, tops = ([], []) if sampled.logprob is None else ([sampled.logprob], [sampled.top])
        reason = self._hear(live, [sampled.token], [depth], logprobs, tops)
        self.scheduler.append(live.request, sampled.token)
        if reason is not None:
            self.scheduler.finish(live.request, reason)

    def _break(self, live: _Live, error: str) -> None:
        """End a request that has no next token."""
        live.error = error
        self.scheduler.finish(live.request, "error")
        if self.prefixes is not None:
            self.prefixes.clear()  # what was computed beside NaN may hold it too

    def _hear(
        self,
        live: _Live,
        ids: list[int],
        depths: list[int],
        logprobs: list[float],
        tops: Sequence[Top] = (),
    ) -> FinishReason | None:
        """Write down new tokens up to the one that ends the request, and cut off those after it. Returns why it
        ended."""
        end = None if live.ends.isdisjoint(ids) else next(n for n, token in enumerate(ids) if token in live.ends)
        reason: FinishReason | None = None
        if end is not None:
            reason = "stop"
            _cut(end + 1, ids, depths, logprobs)
        if live.request.params.stop:
            for n in range(len(ids)):
                live.log.add(ids[n : n + 1], depths[n : n + 1], logprobs[n : n + 1], tops[n : n + 1])
                if n != end and live.log.is_stopped():
                    end, reason = None, "stop"
                    _cut(n + 1, ids, depths, logprobs)
                    break
        else:
            live.log.add(ids, depths, logprobs, tops)
        if reason is None and len(live.log.ids) >= live.request.most_output:
            reason = "length"
        if reason is not None:
            live.log.end(hide_last=end is not None)
        return reason

    def _tell(self, live: _Live) -> RequestOutput:
        """What is new of a request."""
        start, live.told = live.told, len(live.log.ids)
        if live.request.state == "finished":
            self._live.pop(live.request.id, None)
        return _output(live, start)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Generate for all prompts. Returns whole outputs in the order of the prompts, the n samples of one together.

        `params`: one for all, or one each. `progress`: show a bar on a terminal. Raises ValueError for what
        `add_request` refuses, and while other requests are unfinished.
        """
        if any(live.request.state != "finished" for live in self._live.values()):
            raise ValueError("generate needs an engine without other requests: it would take what `step` tells of them")
        if isinstance(prompts, str):
            raise ValueError(f"prompts={reprlib.repr(prompts)} is a single text; write [prompt] for one prompt")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} params for {len(prompts)} prompts; give one for all, or one each")
        names: list[str] = []
        try:
            for number, (prompt, asked) in enumerate(zip(prompts, each, strict=True)):
                names += self.add_request(f"prompt-{number}", prompt, asked)
            lives = [self._live[name] for name in names]
            with GenerationBar(len(names), enabled=progress) as bar:
                while any(live.request.state != "finished" for live in lives):
                    bar.update(self.step(), self.statistics, self.scheduler)
        except BaseException:
            for name in names:
                self.abort(name)
            raise
        return [_output(live, 0) for live in lives]


def _cut(count: int, *columns: list[Any]) -> None:
    for column in columns:
        del column[count:]


def _output(live: _Live, start: int) -> RequestOutput:
    request, log = live.request, live.log
    return RequestOutput(
        id=request.id,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens,
        start=start,
        stop=len(log.ids),
        finish_reason=request.finish_reason,
        error=live.error,
        prompt_scores=None if request.params.prompt_logprobs is None else request.scores,
        log=log,
    )
