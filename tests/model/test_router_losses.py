import math

import pytest
import torch

from mor.model.router_losses import balancing_loss, depth_load, masked_mean, membership_loss, z_loss


def test_membership_loss_by_hand():
    logits, member = torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert membership_loss(logits, member, None).item() == pytest.approx(expected, rel=1e-6)
    valid = torch.tensor([[True, False]])
    assert membership_loss(logits, member, valid).item() == pytest.approx(math.log(2), rel=1e-6)


def test_z_loss_of_one_logit_is_its_square():
    assert z_loss(torch.tensor([[[3.0], [1.0]]]), None).item() == pytest.approx(5.0)
    two = torch.tensor([[[0.0, 0.0]]])
    assert z_loss(two, None).item() == pytest.approx(math.log(2) ** 2, rel=1e-6)


def test_balanced_depths_cost_one_and_load_ignores_padding():
    choice, valid = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[True, True, True, False]])
    load = depth_load(choice, 3, valid)
    assert load.tolist() == pytest.approx([1 / 3] * 3)
    score = torch.full((1, 4, 3), 1 / 3)
    assert balancing_loss(score, load, valid).item() == pytest.approx(1.0)


def test_mean_over_no_tokens_is_zero():
    assert masked_mean(torch.tensor([[5.0]]), torch.tensor([[False]])).item() == 0.0
