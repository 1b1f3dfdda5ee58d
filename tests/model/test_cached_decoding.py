"""Cached decoding, the full causal forward and each row alone are one function, for every architecture."""

import pytest
import torch

from mor.model.calibrate import calibrate
from tests.tiny import architectures, label, left_padding, random_ids, tiny_model

SIZE = 19
MASK = left_padding(0, 4, 12, size=SIZE)


def decode(model, ids, mask, prompt, chunk=1, **kwargs):
    """Logits and depths of a prompt of `prompt` tokens followed by `chunk` tokens at a time."""
    cache, logits, depths, start = None, [], [], 0
    for end in [prompt, *range(prompt + chunk, ids.shape[1] + 1, chunk)]:
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **kwargs)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
        depths.append(output.depths)
    return torch.cat(logits, 1), torch.cat(depths, 1)


def assert_close(found, expected, real):
    scale = expected.abs().max().clamp(min=1)
    assert ((found - expected).abs()[real] / scale).max() < 1e-5


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_decoding_equals_the_full_forward(architecture):
    model, ids, real = tiny_model(**architecture), random_ids(3, SIZE), MASK.bool()
    full = model(ids, attention_mask=MASK, use_cache=False)
    for prompt, chunk in ((1, 1), (5, 2), (13, 1), (SIZE, 1)):
        logits, depths = decode(model, ids, MASK, prompt, chunk)
        size = logits.shape[1]
        assert_close(logits, full.logits[:, :size], real[:, :size])
        assert torch.equal(depths, full.depths[:, :size])


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_padded_batch(architecture):
    model, ids, real = tiny_model(**architecture), random_ids(3, SIZE), MASK.bool()
    batch = model(ids, attention_mask=MASK, use_cache=False)
    for row in range(3):
        alone = model(ids[row : row + 1, real[row]], use_cache=False)
        assert_close(batch.logits[row, real[row]], alone.logits[0], torch.ones(int(real[row].sum()), dtype=torch.bool))
        assert torch.equal(batch.depths[row, real[row]], alone.depths[0])
        assert (batch.depths[row, ~real[row]] == 0).all()


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "token_choice"])
@torch.no_grad()
def test_budgets_differ_by_row_and_decode_alike(router):
    model, ids = tiny_model(router=router), random_ids(3, SIZE)
    calibrate(model, [random_ids(16, 32, seed=9)])
    budget = torch.tensor([1.0, 1.8, 3.0])
    full = model(ids, attention_mask=MASK, mean_depth=budget, use_cache=False)
    logits, depths = decode(model, ids, MASK, 6, mean_depth=budget)
    assert_close(logits, full.logits, MASK.bool())
    assert torch.equal(depths, full.depths)
    assert (depths[0] == 1).all() and (depths[2, 12:] == 3).all()


@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
@torch.no_grad()
def test_padding_may_stand_anywhere(kv_cache):
    model, ids = tiny_model(router="expert_choice", kv_cache=kv_cache), random_ids(1, 12)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    alone = model(ids[:, mask[0].bool()], use_cache=False)
    assert_close(padded.logits[:, mask[0].bool()], alone.logits, torch.ones(1, 7, dtype=torch.bool))


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_chunks_of_padding_alone_change_nothing(architecture):
    model, ids, mask = tiny_model(**architecture), random_ids(2, 12), left_padding(4, 7, size=12)
    full = model(ids, attention_mask=mask, use_cache=False)
    logits, depths = decode(model, ids, mask, 2, chunk=2)
    assert_close(logits, full.logits, mask.bool())
    assert torch.equal(depths, full.depths)


@torch.no_grad()
def test_a_first_recursion_below_full_capacity_still_serves_shared_keys():
    for kv_cache in ("recursion", "shared", "hybrid"):
        model = tiny_model(router="expert_choice", kv_cache=kv_cache, capacities=[0.8, 0.5, 0.2])
        ids = random_ids(2, SIZE)
        full = model(ids, use_cache=False)
        assert 0 < (full.depths == 0).sum() < full.depths.numel()
        logits, depths = decode(model, ids, torch.ones_like(ids), 4)
        assert_close(logits, full.logits, torch.ones_like(ids, dtype=torch.bool))
        assert torch.equal(depths, full.depths)
