import math

import pytest
import torch

from mor.model.backbone import MorModel
from mor.model.scoring import score_tokens
from mor.train import validation
from mor.train.validation import Validator, trained_mean_depth
from tests.tiny import random_ids, tiny_model


def validator(*, calibrated=True, bytes_per_token=2.0):
    rows = [random_ids(3, 24, seed=1), random_ids(2, 24, seed=2)]
    return Validator(
        rows=rows, calibration_rows=[random_ids(8, 24)] if calibrated else [], bytes_per_token=bytes_per_token
    ), rows


def test_figures_are_means_over_the_predicted_tokens_of_all_batches():
    model = tiny_model()
    judge, rows = validator(bytes_per_token=2.0)
    scores = judge.evaluate(model)
    nll = sum(float(score_tokens(model, batch).nll_BT.sum()) for batch in rows) / (5 * 23)
    assert scores.keys() == {"causal"}
    assert scores["causal"]["tokens"] == 5 * 23
    assert scores["causal"]["nll"] == pytest.approx(nll, rel=1e-6)
    assert scores["causal"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / 2, rel=1e-6)
    assert scores["causal"]["mean_depth"] == 1.0


@pytest.mark.parametrize("router", ["expert_choice", "random"])
def test_routers_with_capacities_are_scored_causally_at_their_trained_depth_and_under_top_k(router):
    model = tiny_model(router=router)
    judge, rows = validator()
    scores = judge.evaluate(model)
    assert trained_mean_depth(model) == pytest.approx(2.0)
    assert scores.keys() == {"causal", "top_k"}
    assert scores["top_k"]["mean_depth"] == pytest.approx(2.0)
    assert 1.7 < scores["causal"]["mean_depth"] < 2.3
    expected = sum(float(score_tokens(model, batch, mean_depth=2.0).nll_BT.sum()) for batch in rows) / (5 * 23)
    assert scores["causal"]["nll"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "random", "token_choice"])
def test_a_full_calibration_opens_every_budget(router):
    model = tiny_model(router=router)
    judge, _ = validator()
    judge.finish(model)
    for depth in (1.0, 1.5, 3.0):
        assert score_tokens(model, random_ids(8, 24), mean_depth=depth).depths_BT.double().mean() == pytest.approx(
            depth, abs=0.15
        )


@pytest.mark.parametrize("router", ["none", "fixed", "gate", "token_choice"])
def test_other_routers_have_one_rule(router):
    model = tiny_model(router=router)
    assert trained_mean_depth(model) is None
    assert validator()[0].evaluate(model).keys() == validator()[0].finish(model).keys() == {"causal"}


def test_threshold_choice_is_scored_by_its_own_thresholds_and_under_top_k():
    model = tiny_model(router="threshold_choice")
    judge, rows = validator()
    for scores in (judge.evaluate(model), judge.finish(model)):
        assert scores.keys() == {"causal", "top_k"}
        assert scores["top_k"]["mean_depth"] == pytest.approx(2.0)
        expected = sum(float(score_tokens(model, batch).nll_BT.sum()) for batch in rows) / (5 * 23)
        assert scores["causal"]["nll"] == pytest.approx(expected, rel=1e-6)


def test_without_calibration_the_default_thresholds_are_used():
    model = tiny_model(router="expert_choice")
    judge, rows = validator(calibrated=False)
    scores = judge.finish(model)
    assert not judge.calibrates
    assert bool(model.model.recursion.router.calibration_mean_depth.isnan().all())
    expected = sum(float(score_tokens(model, batch).nll_BT.sum()) for batch in rows) / (5 * 23)
    assert scores["causal"]["nll"] == pytest.approx(expected, rel=1e-6)


def test_without_rows_there_is_nothing_to_score():
    judge = Validator(rows=[], calibration_rows=[random_ids(8, 24)], bytes_per_token=1.0)
    model = tiny_model(router="expert_choice")
    assert judge.evaluate(model) == judge.finish(model) == {}
    assert not model.model.recursion.router.calibration_mean_depth.isnan().any()


def test_evaluation_leaves_the_mode_the_counter_and_the_random_numbers_alone():
    model = tiny_model(router="random").train()
    before = torch.get_rng_state()
    validator()[0].evaluate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert int(model.model.recursion.router.training_forwards) == 0


def test_extreme_capacities_still_have_a_bracket():
    for capacities in ([1.0, 1.0, 1.0], [1.0, 0.01, 0.01], [0.5, 0.3, 0.1]):
        model = tiny_model(router="expert_choice", capacities=capacities)
        judge, _ = validator()
        for judgement in (judge.evaluate, judge.finish):
            assert judgement(model).keys() == {"causal", "top_k"}


def test_attention_stays_inside_documents_while_calibrating_and_scoring():
    """As if a model that is trained so were deployed on documents one by one."""
    rows, calibration_rows = random_ids(3, 24, seed=1), random_ids(8, 24)
    rows[:, 9] = calibration_rows[:, 13] = 0
    for judgement in ("evaluate", "finish"):
        inside, across = (tiny_model(router="expert_choice") for _ in range(2))
        scores = [
            getattr(
                Validator(rows=[rows], calibration_rows=[calibration_rows], bytes_per_token=1.0, **choice), judgement
            )(model)
            for model, choice in ((inside, {"end_of_text": 0}), (across, {}))
        ]
        tables = [model.model.recursion.router.calibration_thresholds for model in (inside, across)]
        assert not torch.equal(tables[0].nan_to_num(9), tables[1].nan_to_num(9))
        found = score_tokens(inside, rows, mean_depth=2.0, end_of_text=0).nll_BT.sum() / (3 * 23)
        assert scores[0]["causal"]["nll"] == pytest.approx(float(found), rel=1e-6)
        assert abs(scores[0]["causal"]["nll"] - scores[1]["causal"]["nll"]) > 1e-3


def test_batches_are_scored_together_where_they_fit(monkeypatch):
    rows, forward = [], MorModel.forward

    def counted(self, **arguments):
        rows.append(len(arguments["input_ids"]))
        return forward(self, **arguments)

    monkeypatch.setattr(MorModel, "forward", counted)
    model, judge = tiny_model(router="expert_choice"), validator()[0]
    together = judge.evaluate(model)
    assert rows == [3 * 8, 5, 5], "three depths of calibration, causal, top_k"
    monkeypatch.setattr(validation, "rows_at_once", lambda *_: 1)
    apart = judge.evaluate(model)
    assert rows[3:] == [3 * 8, 3, 2, 3, 2]
    for rule, scores in together.items():
        assert scores == pytest.approx(apart[rule], rel=1e-6)
