import pytest
import torch

from mor.model.lm_loss import plain_lm_loss
from mor.train.fused_loss import ChunkedLmLoss
from tests.tiny import random_ids, tiny_model


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_chunks_equal_the_plain_loss_and_gradients(chunk):
    hidden, head = torch.randn(2, 12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target = torch.randint(0, 20, (2, 12))
    target[0, :5] = -100
    gradients = []
    for loss in (plain_lm_loss, ChunkedLmLoss(chunk=chunk, compiled=False)):
        hidden.grad = head.grad = None
        value = loss(hidden, head, target)
        (value * 0.3).backward()
        gradients.append((value.detach(), hidden.grad, head.grad))
    for plain, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)


def test_nothing_to_predict_is_no_loss():
    hidden = torch.randn(1, 3, 8, requires_grad=True)
    loss = ChunkedLmLoss(compiled=False)(hidden, torch.randn(20, 8), torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


@pytest.mark.parametrize("router", ["none", "expert_choice"])
def test_the_model_trains_alike_without_logits(router):
    model, ids = tiny_model(router=router, sharing="middle_cycle").train(), random_ids(2, 12)
    plain = model(ids, labels=ids, num_items_in_batch=24)
    fused = model(ids, labels=ids, num_items_in_batch=24, lm_loss=ChunkedLmLoss(chunk=5, compiled=False))
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, plain.loss)
    for loss in (plain.loss, fused.loss):
        loss.backward()
    mean = model(ids, labels=ids, lm_loss=ChunkedLmLoss(chunk=5, compiled=False)).loss
    torch.testing.assert_close(mean, model(ids, labels=ids).loss)


@pytest.mark.gpu
def test_in_bfloat16_the_loss_and_its_gradients_are_those_of_float32_within_rounding():
    hidden, head = torch.randn(4, 300, 64, device="cuda"), torch.randn(500, 64, device="cuda") / 8
    target = torch.randint(0, 500, (4, 300), device="cuda")
    results = []
    for autocast, loss in ((False, plain_lm_loss), (True, ChunkedLmLoss(chunk=256))):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            value = loss(*leaves, target)
        value.backward()
        results.append((value, *(leaf.grad for leaf in leaves)))
    for fused, plain in zip(results[1], results[0], strict=True):
        assert fused.dtype == torch.float32
        assert (fused - plain).norm() / plain.norm() < 1e-2
