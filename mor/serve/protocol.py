"""Requests as OpenAI's clients send them, with what this engine adds. Strict: a field that is unknown, or known and not
served, is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mor.engine.params import SamplingParams
from mor.serve.errors import ApiError, invalid, named_field, unsupported

MOST_FIELDS = 100
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-3
LARGEST_SEED = 2**63 - 1
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_tiny(temperature: float) -> float:
    """Divided by less, logits overflow."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"{temperature} must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
    return temperature


Whole = Annotated[int, BeforeValidator(_whole)]
TokenIds = Annotated[list[Annotated[Whole, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(max_length=1_000_000)]


class Strict(BaseModel):
    """No unknown fields, no conversions, no NaN. Lists are read up to the first wrong item (`fail_fast`): to tell of
    millions would take gigabytes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise ValueError(f"an object with {len(given)} fields is none that this server knows")
        return given


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Strict):
    """What both ways to generate have in common. `null` is a field's default.

    Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`, and the
    compute dial: `mean_depth` (block applications per token to aim at) and `max_recursions` (no token takes more).
    """

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_not_tiny)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[Whole, Field(ge=0, le=LARGEST_SEED)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    mean_depth: Annotated[float, Field(ge=1)] | None = None
    max_recursions: Annotated[Whole, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Any] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None  # whom the caller generates for: of no effect
    # What vllm-router writes into every request; only what is done anyway is taken.
    no_stop_trim: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Generation:
        first, second = self.max_tokens, self.max_completion_tokens
        if first is not None and second is not None and first != second:
            raise ValueError(f"max_tokens={first} and max_completion_tokens={second} differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options=... needs stream=true")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens of output, as asked for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def num_top(self) -> int | None:
        """Most probable tokens to name beside each, None for no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_top(self) -> int | None:
        """The same beside each token of the prompt."""
        return None

    def refuse_unsupported(self) -> None:
        """Raises ApiError naming what of OpenAI's fields is not served."""
        if self.logit_bias:
            raise unsupported("logit_bias")

    def params(self, max_tokens: int) -> SamplingParams:
        """As the engine takes them. Raises ApiError naming the field."""
        given = {
            name: getattr(self, name)
            for name in (
                "min_tokens temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty "
                "seed n ignore_eos mean_depth max_recursions"
            ).split()
            if getattr(self, name) is not None
        }
        if given.get("top_k") == -1:  # vLLM's way to say all
            given["top_k"] = 0
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                logprobs=self.num_top,
                prompt_logprobs=self.num_prompt_top,
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                **given,
            )
        except ValueError as error:
            raise invalid(str(error), named_field(str(error))) from None


class CompletionRequest(Generation):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
        | None
    ) = None
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    suffix: str | None = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_top(self) -> int | None:
        if self.max_tokens == 0:
            return self.logprobs or 0  # the engine's only work without tokens
        return self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, texts or token ids; none given means the beginning of a text."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise unsupported("suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "ask for n samples and choose among them")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens=0 generates nothing; only with echo does it make sense", "max_tokens")
        if self.echo and self.stream:
            raise unsupported("echo", "with stream, the client has the prompt already")


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]
    name: Annotated[str, Field(max_length=64)] | None = None

    @property
    def given(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=1000)]


class TextFormat(Strict):
    """The only format of a response there is."""

    type: Literal["text"]


class ChatRequest(Generation):
    """The body of `/v1/chat/completions`."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    continue_final_message: Literal[False] | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    include_reasoning: Literal[True] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.tools:
            raise unsupported("tools")


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a text, or a chat, to which the template adds the beginning of the answer."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(fail_fast=True, max_length=1_000_000)]


_KIND = re.compile(r"str|int|.*[\[(-].*")
"""Parts of a place that pydantic adds for the kinds that a field may have."""


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings, as an answer that names the field and what would be right."""
    first = _plainest(errors)
    kind, place = first["type"], [str(part) for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return invalid(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["loc"] == ("body",) and kind in ("model_attributes_type", "missing"):
        return invalid("the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    param = ".".join(part for part in place if not _KIND.fullmatch(part))[:100] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
        return ApiError(400, message, param=param, code="unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_parameter")
    if param is None:
        return invalid(message, named_field(message))
    if kind not in ("value_error", "too_short", "too_long", "string_too_long"):  # which tell what they got
        message += f", not {_shown(first['input'])}"
    return invalid(f"{param}: {message}", param)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def _plainest(errors: Sequence[Any]) -> Any:
    """Of a field of several kinds pydantic says what is wrong for each; most telling is what is wrong with the kind
    that was meant, which is the one that was read furthest.
    """
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    meant = [error for error in same if not error["type"].endswith("_type")]
    if meant or len(same) == 1:
        return max(meant or same, key=lambda error: len(error["loc"]))
    places = [[part for part in error["loc"] if isinstance(part, int)] for error in same]
    furthest = [error for error, place in zip(same, places, strict=True) if place == max(places)]
    kinds = dict.fromkeys(str(error["msg"]).removeprefix("Input should be ") for error in furthest)
    return {**furthest[0], "msg": f"Input should be {' or '.join(kinds)}"}
