"""Responses as OpenAI's clients read them, with what this engine adds: depths, and their mean in the usage."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: those of the prompt whose keys and values were known already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and choices. `mean_depth`: block applications per generated token, None for none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    mean_depth: float | None


class CompletionLogprobs(BaseModel):
    """Per token: its text, logarithmic probability (None for the first of an echoed prompt), the most probable ones,
    and where it begins in the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """`depths`: block applications of the position that predicted each token, as many as tokens."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    depths: list[int | None]


class Completion(BaseModel):
    """A response of `/v1/completions`, and a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """`depth`: as in `CompletionChoice.depths`. `text_offset`: where the token begins in the content."""

    top_logprobs: list[TopLogprob]
    depth: int
    text_offset: int


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    depths: list[int]


class ChatCompletion(BaseModel):
    """A response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    depths: list[int]


class ChatChunk(BaseModel):
    """A chunk of a streamed response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model of `/v1/models`.

    `max_model_len`: tokens of a prompt and its output. `has_dial`: whether `mean_depth` may be asked for; `mean_depth`
    is what is spent when it is not. `kv_bytes`: bytes of keys and values of a token of depth 1, 2, ... `has_chat`:
    whether there is a chat template. `limits`: of one request.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    num_recursions: int
    has_dial: bool
    mean_depth: float | None
    kv_bytes: list[int]
    has_chat: bool
    limits: dict[str, int]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """`status`: ready, or why not."""

    status: Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]


class Tokens(BaseModel):
    """The answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DecodedText(BaseModel):
    """The answer of `/detokenize`."""

    prompt: str
