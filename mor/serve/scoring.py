"""How probable a given text is to the model, token by token: the full causal forward, without the engine.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.model.modeling_mor import MorForCausalLM
from mor.serve.messages import TokenScore

ROWS = 256
"""Positions whose logits are held at a time."""


@torch.inference_mode()
def score_prompt(
    model: MorForCausalLM, prompt: Sequence[int], num_top: int, mean_depth: float | None = None
) -> tuple[TokenScore, ...]:
    """Each token's logarithmic probability after those before it and the `num_top` most probable ones in its place.

    Raises ValueError for a budget that the model cannot serve.
    """
    ids_1T = torch.tensor([list(prompt)], device=model.device)
    output = model.model(input_ids=ids_1T, use_cache=False, mean_depth=mean_depth)
    hidden_TD, depths = output.last_hidden_state[0], output.depths[0].tolist()
    scores: list[TokenScore] = [TokenScore(logprob=None, top=(), depth=depths[0])]
    for start in range(0, len(prompt) - 1, ROWS):
        stop = min(start + ROWS, len(prompt) - 1)
        logprobs_TV = model.lm_head(hidden_TD[start:stop]).float().log_softmax(-1)
        scores += _rows(logprobs_TV, prompt[start + 1 : stop + 1], depths[start + 1 : stop + 1], num_top)
    return tuple(scores)


def _rows(logprobs_TV: Tensor, tokens: Sequence[int], depths: Sequence[int], num_top: int) -> list[TokenScore]:
    chosen_T1 = torch.tensor(tokens, device=logprobs_TV.device)[:, None]
    chosen = logprobs_TV.gather(1, chosen_T1)[:, 0].tolist()
    values, ids = (part.tolist() for part in logprobs_TV.topk(min(num_top, logprobs_TV.shape[1]), dim=-1))
    return [
        TokenScore(logprob=logprob, top=tuple(zip(top_ids, top_values)), depth=depth)
        for logprob, top_ids, top_values, depth in zip(chosen, ids, values, depths)
    ]
