from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from mor.model import calibrate as calibration
from mor.model.backbone import MorModel
from mor.model.calibrate import calibrate, calibration_grid
from tests.tiny import BUDGET_ROUTERS, random_ids, tiny_model


@pytest.mark.parametrize("router", BUDGET_ROUTERS)
@pytest.mark.parametrize("kv_cache", ["recursion", "shared"])
@torch.no_grad()
def test_asked_mean_depth_is_met_on_other_text(router, kv_cache, tmp_path):
    model = tiny_model(router=router, kv_cache=kv_cache, num_calibration_points=17)
    calibrate(model, [random_ids(128, 64, seed=1)])
    model.save_pretrained(tmp_path)
    loaded, text = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(128, 64, seed=2)
    for asked in (1.0, 1.05, 1.4, 2.0, 2.6, 2.95, 3.0):
        depths = loaded(text, mean_depth=asked, use_cache=False).depths
        tolerance = 0.0 if asked in (1.0, 3.0) else 0.05
        assert abs(depths.double().mean().item() - asked) <= tolerance, asked


def test_a_default_budget_is_used_when_none_is_asked():
    model, text = tiny_model(router="expert_choice"), random_ids(8, 32)
    calibrate(model, [random_ids(32, 32, seed=1)])
    model.config.mean_depth = 2.5
    assert torch.equal(model(text).depths, model(text, mean_depth=2.5).depths)


def test_grid_reaches_both_ends_and_is_dense_there():
    grid = calibration_grid(3, 33)
    assert grid[0] == 1 and grid[-1] == pytest.approx(3) and grid[1] - grid[0] < 0.01
    assert all(b > a for a, b in pairwise(grid))


def test_a_few_chosen_points_are_enough():
    model = tiny_model(router="expert_choice")
    found = calibrate(model, [random_ids(8, 32), random_ids(8, 32, seed=1)], mean_depths=[2.0, 1.5])
    assert found.num_tokens == 512 and found.mean_depths.tolist() == pytest.approx([1.5, 2.0], abs=0.01)
    with pytest.raises(ValueError, match=r"this model can do 1\.5"):
        model(random_ids(1, 8), mean_depth=1.2)


@pytest.mark.parametrize(
    ("router", "batches", "kwargs", "message"),
    [
        ("gate", [random_ids(1, 4)], {}, "router='gate' has no budget"),
        ("none", [random_ids(1, 4)], {}, "router='none' has no budget"),
        ("expert_choice", [], {}, "at least one row"),
        ("expert_choice", [random_ids(1, 4), random_ids(1, 5)], {}, "one length"),
        ("expert_choice", [random_ids(1, 4)], dict(mean_depths=[2.0]), "1 points; the table holds 2 to 33"),
    ],
)
def test_what_cannot_be_calibrated_is_said(router, batches, kwargs, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model(router=router, sharing="middle_cycle"), batches, **kwargs)


def test_calibration_leaves_the_mode_as_it_was():
    model = tiny_model(router="expert_choice").train()
    calibrate(model, [random_ids(4, 16)], mean_depths=[1.0, 2.0])
    assert model.training and model.model.recursion.router.training_forwards.item() == 0


@pytest.mark.parametrize("end_of_text", [None, 0])
@pytest.mark.parametrize("router", BUDGET_ROUTERS)
def test_several_depths_in_one_forward_find_what_each_alone_finds(router, end_of_text, monkeypatch):
    forwards, forward = [], MorModel.forward

    def counted(self, **arguments):
        forwards.append(len(arguments["input_ids"]))
        return forward(self, **arguments)

    monkeypatch.setattr(MorModel, "forward", counted)
    found = []
    for room in (8, 31):
        monkeypatch.setattr(calibration, "rows_at_once", lambda model, length, room=room: room)
        found.append(calibrate(tiny_model(router=router), [random_ids(8, 48)], end_of_text=end_of_text))
    assert forwards == [8] * 33 + [24] * 11
    torch.testing.assert_close(found[1].mean_depths, found[0].mean_depths, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1].thresholds, found[0].thresholds, rtol=0, atol=1e-5)
    nobody = router != "token_choice"  # reaches the last recursion at the least depth
    assert bool(found[1].thresholds[0].isinf().any()) is nobody
