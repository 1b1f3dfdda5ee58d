"""What the report says of routers, against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mor.evaluate.routing_report import NUM_BINS, QUANTILES, routing_report
from tests.evaluate.models import calibrated, model, rows


def test_depths_and_shares_are_those_of_the_forward() -> None:
    built, text = model(), rows(4, 20)
    with torch.no_grad():
        output = built(text, use_cache=False)
    report = routing_report(built, text.split(2))
    assert report.num_tokens == 80
    assert report.depth_counts == tuple(torch.bincount(output.depths.flatten(), minlength=4).tolist())
    assert report.mean_depth == pytest.approx(output.depths.double().mean().item())
    for r, recursion in enumerate(report.recursions):
        assert recursion.share == pytest.approx((output.depths > r).double().mean().item())


def test_scores_are_counted_and_ordered() -> None:
    built, text = model(), rows(4, 20)
    with torch.no_grad():
        traces = built(text, use_cache=False).routing
    report = routing_report(built, [text])
    for trace, recursion in zip(traces, report.recursions, strict=True):
        scores = trace.logits_BA[trace.valid_BA].sigmoid()
        assert len(recursion.bins) == NUM_BINS
        assert sum(recursion.bins) == len(scores)
        low = int((scores < 0.5).sum())
        assert sum(recursion.bins[: NUM_BINS // 2]) == low
        expected = torch.quantile(scores.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        assert recursion.quantiles == pytest.approx(expected)
    assert [recursion.threshold for recursion in report.recursions] == [0.0, 0.5, 0.5]


def test_sampling_accuracy_by_hand() -> None:
    built, text = model(), rows(3, 12)
    with torch.no_grad():
        traces = built(text, use_cache=False, decision="top_k").routing
    report = routing_report(built, [text])
    assert report.sampling_accuracy is not None
    assert report.sampling_accuracy[0] == 1
    for r in (1, 2):
        agree = (traces[r].logits_BA >= 0) == traces[r].kept_BA
        assert report.sampling_accuracy[r] == pytest.approx(agree.double().mean().item())


def test_dead_positions_by_hand() -> None:
    built, text = model(), rows(5, 12)
    with torch.no_grad():
        depths = built(text, use_cache=False, decision="top_k").depths
    report = routing_report(built, text.split(1))
    assert report.dead_position_ratio == pytest.approx(1 - (depths == 3).any(0).double().mean().item())


def test_budgets_move_depths_and_thresholds() -> None:
    built, text = calibrated(), rows(8, 32, seed=7)
    low, high = (routing_report(built, [text], mean_depth=depth) for depth in (1.3, 2.6))
    assert low.mean_depth < 1.7 < 2.2 < high.mean_depth
    assert low.recursions[1].threshold > high.recursions[1].threshold


def test_token_choice_has_a_distribution_per_depth() -> None:
    report = routing_report(model("token_choice"), [rows(4, 10)])
    assert [sum(recursion.bins) for recursion in report.recursions] == [40, 40, 40]
    assert report.sampling_accuracy is None
    assert report.dead_position_ratio is None
    assert [recursion.threshold for recursion in report.recursions] == [0, 0, 0]


@pytest.mark.parametrize("router", ["vanilla", "none"])
def test_models_without_a_router_have_depths_only(router: str) -> None:
    report = routing_report(model(router), [rows(2, 10)])
    assert report.recursions == ()
    assert report.sampling_accuracy is None
    assert report.mean_depth == (1 if router == "vanilla" else 3)


@pytest.mark.parametrize("router", ["random", "gate", "fixed"])
def test_controls_can_be_reported(router: str) -> None:
    options = {"fixed_depths": [1, 2, 3]} if router == "fixed" else {}
    report = routing_report(model(router, **options), [rows(2, 12)])
    assert len(report.recursions) == 3
    assert sum(report.recursions[0].bins) == 24


def test_recursions_nobody_reached_have_no_scores() -> None:
    report = routing_report(calibrated(), [rows(2, 12)], mean_depth=1.0)
    assert report.depth_counts == (0, 24, 0, 0)
    assert sum(report.recursions[2].bins) == 0
    assert all(math.isnan(q) for q in report.recursions[2].quantiles)


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        routing_report(model(), [])
