"""What the routes do: checks that need the model's facts, texts to tokens, tokens to responses."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from mor.engine.prompt_ids import check_ids
from mor.serve.async_engine import AsyncEngine
from mor.serve.chat import TextCoder
from mor.serve.errors import ApiError, invalid, unavailable
from mor.serve.messages import ModelFacts
from mor.serve.metrics import Metrics
from mor.serve.middleware import JsonResponse
from mor.serve.options import ServeOptions
from mor.serve.protocol import COMPLETION_TOKENS, ChatRequest, CompletionRequest, Generation
from mor.serve.replies import ModelCard
from mor.serve.responses import EventStream, read_all
from mor.serve.writers import ChatShape, CompletionShape, Echo, Shape, Writer


class Service:
    """Answers requests with an engine's tokens."""

    def __init__(self, engine: AsyncEngine, coder: TextCoder, options: ServeOptions, metrics: Metrics) -> None:
        self.engine, self.coder, self.options, self.metrics = engine, coder, options, metrics
        self._since = int(time.time())

    @property
    def facts(self) -> ModelFacts:
        """Raises ApiError while the model is not loaded."""
        if self.engine.facts is None:
            raise unavailable(self.engine.state)
        return self.engine.facts

    def model_card(self) -> ModelCard:
        """What `/v1/models` says."""
        facts = self.facts
        return ModelCard(
            id=self.options.model_name,
            object="model",
            created=self._since,
            owned_by="mor",
            max_model_len=facts.max_length,
            num_recursions=facts.num_recursions,
            has_dial=facts.has_dial,
            mean_depth=facts.mean_depth,
            kv_bytes=list(facts.kv_bytes),
            has_chat=self.coder.has_chat,
            limits={
                "max_tokens": min(self.options.max_tokens or facts.max_length, facts.max_length - 1),
                "max_choices": self.options.max_choices,
                "max_body_bytes": self.options.max_body_bytes,
            },
        )

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served here; None is the one that is."""
        if name is not None and name != self.options.model_name:
            message = f"the model {name!r} is not served here; {self.options.model_name!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """`/v1/completions`."""
        self._check(body, len(body.prompts))
        prompts = [await self._tokens(prompt) for prompt in body.prompts]
        max_tokens = self._max_tokens(body, prompts, default=COMPLETION_TOKENS)
        echoes = await self._echoes(prompts) if body.echo else ()
        shape = CompletionShape(
            self.coder.vocabulary,
            with_logprobs=body.logprobs is not None,
            samples_per_prompt=body.n or 1,
            echoes=echoes,
        )
        return await self._answer(body, request, shape, prompts, max_tokens)

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids. Raises ApiError for one that the model does not have."""
        if isinstance(prompt, str):
            return await self.coder.encode(prompt)
        try:
            check_ids(prompt, self.facts.vocab_size)
        except ValueError as error:
            raise invalid(str(error), "prompt") from None
        return prompt

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """`/v1/chat/completions`."""
        self._check(body, 1)
        prompts = [await self.coder.encode_chat(body.messages)]
        max_tokens = self._max_tokens(body, prompts, default=None)
        shape = ChatShape(self.coder.vocabulary, with_logprobs=bool(body.logprobs))
        return await self._answer(body, request, shape, prompts, max_tokens)

    def _check(self, body: CompletionRequest | ChatRequest, num_prompts: int) -> None:
        self.check_model(body.model)
        body.refuse_unsupported()
        if num_prompts * (body.n or 1) > self.options.max_choices:
            each = f"{num_prompts} prompts with n={body.n or 1}"
            raise invalid(f"n: {each} exceed max_choices={self.options.max_choices}", "n")

    def _max_tokens(self, body: Generation, prompts: Sequence[Sequence[int]], default: int | None) -> int:
        """Tokens that each sample may have. Raises ApiError for a prompt too long, or a number above the limit."""
        longest, facts = max(map(len, prompts)), self.facts
        room = facts.max_length - longest
        limit, asked = self.options.max_tokens, body.asked_tokens
        most = facts.max_length - (asked != 0)
        if longest > most:
            message = f"the prompt has {longest} tokens; at most {most} fit{' beside one of output' * (asked != 0)}"
            raise ApiError(400, message, param=_source(body), code="context_length_exceeded")
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        if asked is None:
            return min(number for number in (default, limit, room) if number is not None)
        if limit is not None and asked > limit:
            raise invalid(f"{field}={asked} exceeds this server's limit of {limit}", field)
        if asked > room:
            message = f"{field}={asked} exceeds the {room} tokens that a prompt of {longest} leaves of "
            raise ApiError(400, f"{message}{facts.max_length}", param=field, code="context_length_exceeded")
        return asked

    async def _echoes(self, prompts: Sequence[Sequence[int]]) -> list[Echo]:
        """The prompts as their completions repeat them."""
        echoes: list[Echo] = []
        for tokens in prompts:
            text, offsets = await self.coder.pieces(tokens)
            echoes.append(Echo(text=text, tokens=tuple(tokens), offsets=tuple(offsets)))
        return echoes

    async def _answer(
        self, body: Generation, request: Request, shape: Shape, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> Response:
        stream = self.engine.open(prompts, body.params(max_tokens))
        writer = self._writer(body, shape, prompts)
        if not body.stream:
            return JsonResponse(writer.whole(await read_all(stream, request)))
        try:
            await stream.accepted()  # a refusal is still a response of its own
        except BaseException:
            stream.close()
            raise
        return EventStream(stream, writer)

    def _writer(self, body: Generation, shape: Shape, prompts: Sequence[Sequence[int]]) -> Writer:
        return Writer(
            shape,
            model=self.options.model_name,
            prompt_tokens=sum(map(len, prompts)),
            num_choices=len(prompts) * (body.n or 1),
            samples_per_prompt=body.n or 1,
            usage_at_end=body.wants_usage,
            usage_always=body.wants_continuous_usage,
        )


def _source(body: Generation) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"
