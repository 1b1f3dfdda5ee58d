"""What a router does, in numbers: pure functions on depths and `RecursionTrace`s.

Depths are block applications per token. They are taken from training rows, which hold no padding, so that a depth of 0
is a token that no recursion took.

Legend: B rows, T tokens of a row, A tokens scored at a recursion, R recursions. Counts are int64 tensors on the
device of their inputs, so that they can be summed over steps without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mor.model.routing import RecursionTrace


def depth_counts(depths_BT: Tensor, num_recursions: int) -> Tensor:
    """(R+1,) how many tokens have depth 0, 1, ..., R."""
    levels = torch.arange(num_recursions + 1, device=depths_BT.device)
    return (depths_BT.flatten()[:, None] == levels).sum(0)


def mean_depth(counts: Sequence[int]) -> float:
    """Block applications per token, from `depth_counts`."""
    return sum(depth * count for depth, count in enumerate(counts)) / sum(counts)


def active_shares(counts: Sequence[int]) -> list[float]:
    """Share of tokens active at each recursion: the capacities as they were, from `depth_counts`."""
    total = sum(counts)
    return [sum(counts[recursion + 1 :]) / total for recursion in range(len(counts) - 1)]


def depth_load(counts: Sequence[int]) -> list[float]:
    """Share of tokens that stopped at depth 1, ..., R among those that took any recursion, from `depth_counts`."""
    total = max(1, sum(counts[1:]))
    return [count / total for count in counts[1:]]


def max_violation(load: Sequence[float]) -> float:
    """MaxVio, (max load - mean load) / mean load (arXiv 2408.15664); 0 is even use, R - 1 a collapse to one depth."""
    mean = sum(load) / len(load)
    return (max(load) - mean) / mean


def load_entropy(load: Sequence[float]) -> float:
    """-sum p ln p of the shares per depth, in nats; at most ln R."""
    return sum(p * math.log(1 / p) for p in load if p > 0)


def visited_positions(depths_BT: Tensor, num_recursions: int) -> Tensor:
    """(T,) in how many rows each position took the last recursion."""
    return (depths_BT >= num_recursions).sum(0)


def dead_token_ratio(visits: Sequence[int]) -> float:
    """Share of positions that never took the last recursion, from the sum of `visited_positions` over many rows.

    A router that always takes the same positions leaves 1 - capacity of them dead (arXiv 2507.10524, Table 13).
    """
    return sum(count == 0 for count in visits) / len(visits)


def sampling_counts(trace: RecursionTrace, boundary: float) -> Tensor:
    """(2,) scored tokens whose membership the causal score predicts without seeing the future, and scored tokens.

    A token is predicted to continue at a score of at least `boundary`: see `sampling_boundary`.
    """
    right_BA = ((trace.decisive_BA >= boundary) == trace.kept_BA) & trace.valid_BA
    return torch.stack([right_BA.sum(), trace.valid_BA.sum()])


def sampling_boundary(activation: str | None, causal_method: str) -> float:
    """The logit from which a token is predicted to continue, as in the authors' code.

    sigmoid(logit) >= 0.5 and tanh(logit) >= 0 are both logit >= 0; a bare logit is compared with 0.5; an auxiliary
    router's goes through a sigmoid.
    """
    return 0.5 if activation == "identity" and causal_method != "aux_router" else 0.0


def sampling_accuracy(counts: Sequence[Sequence[int]]) -> list[float]:
    """Share of right predictions at each recursion, from the sums of `sampling_counts`."""
    return [right / max(1, scored) for right, scored in counts]
