"""The engine: requests in, tokens out, with continuous depth-wise batching.

Every visit applies the shared block once to every live sequence, at whatever recursion it is; those that finish a token
get the head and start the next; nobody waits for another's depth.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.engine.block_pool import BlockPool
from mor.engine.detokenizer import Detokenizer, TextPiece
from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput, TokenOutput
from mor.engine.params import SamplingParams
from mor.engine.prefix_cache import PrefixCache
from mor.engine.progress import GenerationBar, Statistics
from mor.engine.request import Request
from mor.engine.runner import Runner
from mor.engine.sampler import Sampled, SamplingRow, sample
from mor.engine.scheduler import Limits, Plan, Scheduler
from mor.loading import load_model
from mor.model.modeling_mor import MorForCausalLM

Prompt = str | Sequence[int]


@dataclass(kw_only=True)
class _Live:
    """A request while it runs: its text, what it said so far, and how much of that was told."""

    request: Request
    seed: int
    text: Detokenizer
    tokens: list[TokenOutput] = field(default_factory=list[TokenOutput])
    told: int = 0
    error: str | None = None


class Engine:
    """Generates for many requests at once.

    Offline: `generate`. Online: `add_request`, then `step` while `has_unfinished`; `abort` at any time.
    """

    def __init__(self, model: MorForCausalLM, tokenizer: Any, options: EngineOptions | None = None) -> None:
        self.options = EngineOptions() if options is None else options
        self.model, self.tokenizer = model.eval(), tokenizer
        layout = PageLayout.of(model.config, self.options.page_entries)
        num_pages = choose_num_pages(self.options, layout.page_bytes(model.dtype), model.device)
        self._store = KvStore(layout, num_pages, device=model.device, dtype=model.dtype)
        self.runner = Runner(model, layout, self._store)
        self.pool = BlockPool(num_pages)
        self.prefixes = PrefixCache(self.pool, layout.shape) if self.options.prefix_caching else None
        limits = Limits(
            max_requests=self.options.max_requests,
            max_visit_tokens=self.options.max_visit_tokens,
            prefill_chunk=self.options.prefill_chunk,
            max_length=_max_length(self.options, model),
        )
        self.scheduler = Scheduler(shape=layout.shape, limits=limits, pool=self.pool, prefix_cache=self.prefixes)
        self.statistics = Statistics()
        self._live: dict[str, _Live] = {}
        self._failed: list[_Live] = []
        self._seeds = random.Random(self.options.seed)
        self._end_of_text = end_tokens(model, tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto", options: EngineOptions | None = None) -> Engine:
        """An engine on the model and tokenizer at `path`: a model folder, a run, or a demo.

        Raises FileNotFoundError or ValueError naming what is missing or wrong.
        """
        return cls(*load_model(path, device=device), options)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._live)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> list[str]:
        """Queue a prompt, a text or its token ids. Returns the ids of its samples: `request_id` itself, or with n > 1
        `request_id-0`, `request_id-1`, ...

        Raises ValueError naming what is wrong or too long; then nothing is queued.
        """
        params = SamplingParams() if params is None else params
        ids = self._encode(prompt)
        self.runner.budgets.check(params.budget)
        names = [request_id] if params.n == 1 else [f"{request_id}-{number}" for number in range(params.n)]
        texts = [Detokenizer(self.tokenizer, params.stop, prompt=ids, min_tokens=params.min_tokens) for _ in names]
        requests = [Request(id=name, prompt=ids, params=params) for name in names]
        self._queue(requests)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        for number, (request, text) in enumerate(zip(requests, texts, strict=True)):
            self._live[request.id] = _Live(request=request, seed=seed + number, text=text)
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

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids, vocabulary = tuple(int(token) for token in prompt), self.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"the prompt has token {wrong}, which is outside the vocabulary 0..{vocabulary - 1}")
        return ids

    def abort(self, request_id: str) -> bool:
        """End a request at once; its pages are free. False if there is none of this id."""
        self._live.pop(request_id, None)
        return self.scheduler.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """One visit. Returns what is new: of every request that got a token or ended, its tokens since the last time.

        What a visit raises is raised here. The requests that took part have then failed, as the next step says.
        """
        plan = self.scheduler.plan()
        try:
            new = self._visit(plan) if plan.segments else []
        except BaseException as error:
            self._fail(plan, error)
            raise
        failed, self._failed = self._failed, []
        return [*(self._tell(live) for live in failed if self._live.get(live.request.id) is live), *new]

    def _fail(self, plan: Plan, error: BaseException) -> None:
        """End the requests of a visit that broke off."""
        self.runner.forget()
        for request in (segment.request for segment in plan.segments):
            live = self._live[request.id]
            if request.state != "finished":
                live.error = f"{type(error).__name__}: {error}"
                self.scheduler.finish(request, "error")
            self._failed.append(live)

    def _visit(self, plan: Plan) -> list[RequestOutput]:
        self._store.copy_pages([copy.source for copy in plan.copies], [copy.target for copy in plan.copies])
        results = self.runner.visit(plan.segments)
        done: list[tuple[_Live, int, Tensor]] = []
        for segment, result in zip(plan.segments, results, strict=True):
            logits_V = self.runner.take_logits(segment)
            self.scheduler.complete(segment, result)
            if logits_V is not None:
                done.append((self._live[segment.request.id], result.depths[-1], logits_V))
        self.statistics.add(visits=1, rows=plan.num_tokens, preemptions=len(plan.preempted))
        return self._sample(done)

    def _sample(self, done: Sequence[tuple[_Live, int, Tensor]]) -> list[RequestOutput]:
        if not done:
            return []
        sampled = sample(torch.stack([logits_V for *_, logits_V in done]), [self._row(live) for live, *_ in done])
        for (live, depth, _), token in zip(done, sampled, strict=True):
            self._take(live, token, depth)
        self.statistics.add(tokens=len(done))
        return [self._tell(live) for live, *_ in done]

    def _row(self, live: _Live) -> SamplingRow:
        request = live.request
        ends = frozenset() if request.params.ignore_eos else self._end_of_text
        stops = ends | set(request.params.stop_token_ids)
        is_early = len(request.output) < request.params.min_tokens
        return SamplingRow(
            params=request.params,
            seed=live.seed,
            index=len(request.output),
            prompt=request.prompt,
            output=request.output,
            banned=tuple(sorted(stops)) if is_early else (),
        )

    def _take(self, live: _Live, sampled: Sampled, depth: int) -> None:
        """Add a token to its request, and end the request if this was its last."""
        request, params = live.request, live.request.params
        if sampled.error is not None:
            live.error = sampled.error
            self.scheduler.finish(request, "error")
            if self.prefixes is not None:
                self.prefixes.clear()  # what was computed beside NaN may hold it too
            return
        self.scheduler.append(request, sampled.token)
        is_end = sampled.token in params.stop_token_ids or (
            sampled.token in self._end_of_text and not params.ignore_eos
        )
        piece = TextPiece("", live.text.offset) if is_end else live.text.feed(sampled.token)
        reason = None
        if is_end or live.text.stopped is not None:
            reason = "stop"
        elif len(request.output) >= self.scheduler.most_output(request):
            reason = "length"
        rest = live.text.finish() if reason else ""
        live.tokens.append(
            TokenOutput(
                token=sampled.token,
                text=piece.text + rest,
                offset=piece.offset,
                logprob=sampled.logprob,
                top_logprobs=sampled.top,
                depth=depth,
            )
        )
        if reason:
            self.scheduler.finish(request, reason)

    def _tell(self, live: _Live) -> RequestOutput:
        """What is new of a request."""
        request, new = live.request, live.tokens[live.told :]
        live.told = len(live.tokens)
        if request.state == "finished":
            self._live.pop(request.id, None)
        return _output(live, new)

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
        return [_output(live, live.tokens) for live in lives]


def _output(live: _Live, tokens: Sequence[TokenOutput]) -> RequestOutput:
    request, depths = live.request, [token.depth for token in live.tokens]
    return RequestOutput(
        id=request.id,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens,
        tokens=tuple(tokens),
        text="".join(token.text for token in tokens),
        finished=request.state == "finished",
        finish_reason=request.finish_reason,
        mean_depth=sum(depths) / len(depths) if depths else None,
        error=live.error,
    )


def end_tokens(model: MorForCausalLM, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's generation settings or the tokenizer name them."""
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    if named is None:
        named = getattr(tokenizer, "eos_token_id", None)
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)


def choose_num_pages(options: EngineOptions, page_bytes: int, device: torch.device) -> int:
    """Pages of the pool: as given, or what its memory holds. Raises ValueError if that is none."""
    if options.num_pages is not None:
        return options.num_pages
    memory = 2**30 if options.kv_memory_gib is None else options.kv_memory_gib * 2**30
    if options.kv_memory_gib is None and device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] * options.memory_share
    if memory < page_bytes:
        raise ValueError(f"{memory / 2**20:.1f} MiB hold no page of {page_bytes / 2**20:.1f} MiB; raise kv_memory_gib")
    return int(memory // page_bytes)


def _max_length(options: EngineOptions, model: MorForCausalLM) -> int:
    most = int(model.config.max_position_embeddings)
    if options.max_length is not None and options.max_length > most:
        raise ValueError(f"max_length={options.max_length} exceeds the model's max_position_embeddings={most}")
    return most if options.max_length is None else options.max_length
