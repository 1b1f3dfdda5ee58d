import pytest
import torch

from mor.model.cache import MorCache
from mor.model.cost import active_counts, kv_bytes
from tests.tiny import KV_CACHES, architectures, label, left_padding, random_ids, tiny_model


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_bytes_held_are_what_the_cost_model_predicts(architecture):
    model, ids = tiny_model(**architecture), random_ids(3, 21)
    mask = left_padding(0, 6, 2, size=21)
    output = model(ids[:, :17], attention_mask=mask[:, :17])
    depths = [output.depths]
    for t in range(17, 21):
        cache = output.past_key_values
        output = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        depths.append(output.depths)
    active = active_counts(torch.cat(depths, 1).flatten().tolist(), model.config.num_recursions)
    predicted = kv_bytes(model.config, active, num_tokens=int(mask.sum()), dtype_bytes=4)
    assert output.past_key_values.kv_bytes() == predicted


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@torch.no_grad()
def test_a_prompt_allocates_no_more_than_it_holds(kv_cache):
    model = tiny_model(router="expert_choice", kv_cache=kv_cache)
    cache = model(random_ids(1, 40)).past_key_values
    assert cache.allocated_bytes() == cache.kv_bytes()


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@torch.no_grad()
def test_rows_can_be_picked_repeated_and_cropped(kv_cache):
    model, ids = tiny_model(router="expert_choice", kv_cache=kv_cache), random_ids(3, 15)
    mask = left_padding(0, 3, 5, size=15)
    cache = model(ids, attention_mask=mask).past_key_values
    cache.crop(9)
    assert cache.get_seq_length() == 9
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 3]))
    rows = torch.tensor([2, 0, 1])
    out = model(ids[rows][:, 9:], attention_mask=mask[rows], past_key_values=cache)
    full = model(ids[rows], attention_mask=mask[rows], use_cache=False)
    torch.testing.assert_close(out.logits, full.logits[:, 9:], atol=1e-5, rtol=1e-4)
    cache.crop(-4)
    assert cache.get_seq_length() == 11 and cache.num_tokens == [6, 11, 8]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.kv_bytes() == 0


def test_writing_by_layer_is_refused():
    with pytest.raises(NotImplementedError, match="per recursion"):
        MorCache(tiny_model().config).update(None, None, 0)


def test_a_cache_goes_by_the_old_name_of_transformers_and_by_the_new_one() -> None:
    model, ids = tiny_model(), random_ids(1, 9)
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    assert isinstance(first.cache, MorCache) and first.cache is first.past_key_values
    second = model(ids[:, 4:6], cache=first.cache)
    third = model(ids[:, 6:], past_key_values=second.cache)
    assert third.cache is first.cache
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cache and past_key_values are the same"):
        model(ids[:, :1], cache=first.cache, past_key_values=first.cache)
    with pytest.raises(ValueError, match=r"^cache must be a MorCache, got dict"):
        model(ids[:, :1], cache={})
