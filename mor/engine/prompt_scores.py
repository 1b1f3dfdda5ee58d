"""How probable the tokens of prompts are, read from the rows before them when these leave the recursion.

Legend: N rows that leave, M those of them that predict a token to be scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mor.engine.request import Segment, TokenScore
from mor.engine.sampler import log_probabilities

ROWS_AT_ONCE = 128
"""Rows whose logits exist at a time, whatever the length of a chunk."""


def score_rows(
    segments: Sequence[Segment], depths_N: Sequence[int], x_ND: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> dict[int, tuple[TokenScore, ...]]:
    """Scores of the segments that have tokens to score, by their `id`.

    `x_ND`: the segments' rows one after another, as the head takes them; `depths_N`: block applications of each.
    """
    rows: list[int] = []
    tokens: list[int] = []
    num_tops: list[int] = []
    first = 0
    for segment in segments:
        for number in segment.scoring:
            rows.append(first + number - segment.start)
            tokens.append(segment.request.prompt[number + 1])
            num_tops.append(segment.request.params.prompt_logprobs or 0)
        first += segment.count
    scores: list[TokenScore] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        token_M = torch.tensor(tokens[part], device=x_ND.device)
        found = log_probabilities(logits_of(x_ND[rows[part]]), token_M, num_tops[part])
        scores += [TokenScore(*about, depths_N[row]) for about, row in zip(found, rows[part], strict=True)]
    ahead = iter(scores)
    return {id(segment): tuple(next(ahead) for _ in segment.scoring) for segment in segments if segment.scoring}
