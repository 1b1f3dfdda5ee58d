"""Log-likelihoods and greedy text for tasks: the same questions, answered by the model itself or by the engine.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from mor.model.modeling_mor import MorForCausalLM

Pair = tuple[Sequence[int], Sequence[int]]


class Backend(Protocol):
    """What answers. Contexts and continuations are token ids, neither of them empty; causal decisions throughout."""

    max_length: int

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether it is the greedy one.

        What does not fit into `max_length` is cut from the left of the context.
        """
        ...

    def write(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation, up to the end of the text."""
        ...


def fit(pair: Pair, max_length: int) -> tuple[list[int], int]:
    """Context and continuation as one row, cut from the left to `max_length`, and how many tokens are continuation.

    Raises ValueError for an empty part, or a continuation that leaves no room for a token before it.
    """
    context, continuation = map(list, pair)
    if not context or not continuation:
        raise ValueError("a context and a continuation need at least one token each")
    if len(continuation) >= max_length:
        raise ValueError(f"a continuation of {len(continuation)} tokens is too long for max_length={max_length}")
    return (context + continuation)[-max_length:], len(continuation)


class ModelBackend:
    """The model's own forward on batches of rows, longest first, padded on the right."""

    def __init__(
        self, model: MorForCausalLM, *, end_of_text: int, batch_size: int = 8, mean_depth: float | None = None
    ) -> None:
        self._model, self._end, self._batch, self._depth = model.eval(), end_of_text, batch_size, mean_depth
        self.max_length = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows = [fit(pair, self.max_length) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            for number, answer in zip(chosen, self._score([rows[n] for n in chosen]), strict=True):
                found[number] = answer
        return found

    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        length = max(len(ids) for ids, _ in rows)
        ids_BT = torch.tensor([F.pad(torch.tensor(ids), (0, length - len(ids))).tolist() for ids, _ in rows])
        real_BT = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
        device = self._model.device
        output: Any = self._model(
            ids_BT.to(device), attention_mask=real_BT.to(device), use_cache=False, mean_depth=self._depth
        )
        answers = []
        for (ids, count), logits_TV in zip(rows, output.logits, strict=True):
            log_TV = logits_TV[len(ids) - count - 1 : len(ids) - 1].float().log_softmax(-1)
            target_T = torch.tensor(ids[-count:], device=device)
            total = float(log_TV.gather(1, target_T[:, None]).sum())
            answers.append((total, bool((log_TV.argmax(-1) == target_T).all())))
        return answers

    def write(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        kept = list(prompt)[-(self.max_length - max_tokens) :]
        ids = torch.tensor([kept], device=self._model.device)
        options: dict[str, Any] = {} if self._depth is None else {"mean_depth": self._depth}
        rows: Any = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self._end,
            pad_token_id=self._end,
            **options,
        )
        return [token for token in rows[0, len(kept) :].tolist() if token != self._end]
