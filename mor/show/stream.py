"""Text with the depth of every token, one token at a time: of a text that is given, and of one that the model writes.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor.data.pieces import PieceDecoder
from mor.model.modeling_mor import MorForCausalLM
from mor.show.tokens import TokenView


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to write.

    `min_new_tokens`: the text may not end before. `temperature`: 0 takes the most probable token. `top_p`: draw among
    the most probable tokens that together have this probability. `mean_depth`: budget in block applications per token,
    None for the model's own. `seed`: of the draws.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    mean_depth: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


@torch.no_grad()
def stream_tokens(model: MorForCausalLM, tokenizer: Any, prompt: str, sampling: Sampling) -> Iterator[TokenView]:
    """The prompt's tokens, then new ones as they are drawn, with causal depths; ends early at the end of the text.

    A token's depth is known when the model has read it, so each is given with the next one under way. Text beyond the
    model's longest sequence is not written. An empty prompt stands for the beginning of a text.

    Raises ValueError for a prompt that leaves no room, or a budget the model cannot serve.
    """
    prompt_ids = encode(tokenizer, prompt) or [_end_of_text(tokenizer)]
    limit = model.config.max_position_embeddings - len(prompt_ids)
    if limit < 1:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens; this model reads at most {model.config.max_position_embeddings}"
        )
    decoder = PieceDecoder(tokenizer)
    model.eval()
    output = _read(model, prompt_ids, None, sampling)
    yield from _views(decoder, prompt_ids, output.depths[0], output.logits[0], from_prompt=True)
    generator = torch.Generator().manual_seed(sampling.seed)
    for number in range(min(sampling.max_new_tokens, limit)):
        banned = tokenizer.eos_token_id if number < sampling.min_new_tokens else None
        token, probability = draw(output.logits[0, -1], sampling, generator, banned=banned)
        if token == tokenizer.eos_token_id:
            break
        output = _read(model, [token], output.cache, sampling)
        yield TokenView(text=decoder.feed(token), depth=int(output.depths[0, -1]), probability=probability)
    rest = decoder.flush()
    if rest:
        yield TokenView(text=rest, depth=int(output.depths[0, -1]))


@torch.no_grad()
def read_tokens(
    model: MorForCausalLM, tokenizer: Any, text: str, *, mean_depth: float | None = None
) -> list[TokenView]:
    """A given text's tokens with their causal depths and the probability of each after its prefix.

    Raises ValueError for an empty text, or one longer than the model reads.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise ValueError("the text is empty: there is nothing to show")
    if len(ids) > model.config.max_position_embeddings:
        raise ValueError(
            f"the text has {len(ids)} tokens; this model reads at most {model.config.max_position_embeddings}"
        )
    model.eval()
    output = model(torch.tensor([ids], device=model.device), use_cache=False, mean_depth=mean_depth)
    decoder = PieceDecoder(tokenizer)
    views = list(_views(decoder, ids, output.depths[0], output.logits[0], from_prompt=False))
    rest = decoder.flush()
    return [*views, TokenView(text=rest, depth=views[-1].depth)] if rest else views


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's token ids, without tokens that a template would add."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def draw(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator, *, banned: int | None = None
) -> tuple[int, float]:
    """A token other than `banned`, from the model's distribution after temperature and top-p, and its probability
    before them."""
    logits_V = logits_V.float().cpu()
    probability_V = logits_V.softmax(-1)
    if banned is not None:
        logits_V = logits_V.index_fill(0, torch.tensor([banned]), -torch.inf)
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
        return token, float(probability_V[token])
    tempered, order = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    kept = tempered.where(tempered.cumsum(0) - tempered < sampling.top_p, 0.0)
    token = int(order[torch.multinomial(kept, 1, generator=generator)])
    return token, float(probability_V[token])


def _read(model: MorForCausalLM, ids: list[int], cache: Any, sampling: Sampling) -> Any:
    rows = torch.tensor([ids], device=model.device)
    return model(rows, cache=cache, use_cache=True, mean_depth=sampling.mean_depth)


def _views(
    decoder: PieceDecoder, ids: list[int], depths_T: Tensor, logits_TV: Tensor, *, from_prompt: bool
) -> Iterator[TokenView]:
    probability_TV = logits_TV.float().softmax(-1)
    for place, (token, depth) in enumerate(zip(ids, depths_T.tolist(), strict=True)):
        probability = float(probability_TV[place - 1, token]) if place else None
        yield TokenView(text=decoder.feed(token), depth=depth, probability=probability, from_prompt=from_prompt)


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("an empty prompt needs a tokenizer with an end-of-text token; give some text")
    return tokenizer.eos_token_id
