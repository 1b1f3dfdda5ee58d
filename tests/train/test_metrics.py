"""Hand-computed values. Three recursions throughout."""

import math

import pytest
import torch

from mor.model.routing import RecursionTrace
from mor.train import metrics

DEPTHS_BT = torch.tensor([[1, 3, 2, 1], [3, 3, 1, 1]])  # counts: four of 1, one of 2, three of 3


def trace(scores, kept, valid=None):
    scores_BA, kept_BA = torch.tensor(scores), torch.tensor(kept)
    return RecursionTrace(
        recursion=0,
        token_index_BA=torch.arange(scores_BA.shape[1]).expand(scores_BA.shape),
        valid_BA=torch.ones_like(kept_BA) if valid is None else torch.tensor(valid),
        logits_BA=scores_BA,
        gate_BA=scores_BA.sigmoid(),
        kept_BA=kept_BA,
        decisive_BA=scores_BA,
    )


def test_depths():
    counts = metrics.depth_counts(DEPTHS_BT, 3).tolist()
    assert counts == [0, 4, 1, 3]
    assert metrics.mean_depth(counts) == (4 + 2 + 9) / 8
    assert metrics.active_shares(counts) == [1.0, 4 / 8, 3 / 8]
    assert metrics.depth_load(counts) == [4 / 8, 1 / 8, 3 / 8]


def test_tokens_that_no_recursion_took():
    counts = metrics.depth_counts(torch.tensor([[0, 0, 2, 1]]), 3).tolist()
    assert counts == [2, 1, 1, 0]
    assert metrics.mean_depth(counts) == 0.75
    assert metrics.active_shares(counts) == [0.5, 0.25, 0.0]
    assert metrics.depth_load(counts) == [0.5, 0.5, 0.0]
    assert metrics.depth_load([4, 0, 0, 0]) == [0.0, 0.0, 0.0]


def test_max_violation_and_entropy():
    assert metrics.max_violation([1 / 3] * 3) == pytest.approx(0)
    assert metrics.max_violation([0.5, 0.125, 0.375]) == pytest.approx(0.5)
    assert metrics.max_violation([1.0, 0.0, 0.0]) == pytest.approx(2)
    assert metrics.load_entropy([1 / 3] * 3) == pytest.approx(math.log(3))
    assert metrics.load_entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5 * math.log(2))
    assert metrics.load_entropy([0.0, 1.0, 0.0]) == 0.0


def test_dead_tokens_are_positions_that_never_took_the_last_recursion():
    visits_T = metrics.visited_positions(DEPTHS_BT, 3)
    assert visits_T.tolist() == [1, 2, 0, 0]
    assert metrics.dead_token_ratio(visits_T.tolist()) == 0.5
    assert metrics.dead_token_ratio((visits_T + torch.tensor([0, 0, 5, 0])).tolist()) == 0.25


def test_sampling_accuracy_compares_the_score_with_membership_among_real_tokens():
    first = trace([[2.0, -1.0, 0.0, 0.3]], [[True, True, True, False]])
    assert metrics.sampling_counts(first, 0.0).tolist() == [2, 4]
    assert metrics.sampling_counts(first, 0.5).tolist() == [2, 4]
    padded = trace([[2.0, -1.0, 9.0]], [[True, False, False]], valid=[[True, True, False]])
    assert metrics.sampling_counts(padded, 0.0).tolist() == [2, 2]
    assert metrics.sampling_accuracy([[2, 4], [2, 2], [0, 0]]) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("activation", "method", "boundary"),
    [
        ("sigmoid", "aux_loss", 0.0),
        ("tanh", "aux_loss", 0.0),
        ("identity", "aux_loss", 0.5),
        ("identity", "aux_router", 0.0),
    ],
)
def test_sampling_boundary_is_that_of_the_authors_code(activation, method, boundary):
    assert metrics.sampling_boundary(activation, method) == boundary
