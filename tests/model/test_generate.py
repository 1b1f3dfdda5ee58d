import pytest
import torch

from mor.model.cache_name import CACHE_NAME
from mor.model.calibrate import calibrate
from tests.tiny import architectures, label, left_padding, random_ids, tiny_model

SETTINGS = dict(max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("architecture", architectures(), ids=label)
def test_greedy_and_beams_do_not_depend_on_the_cache(architecture):
    model, ids = tiny_model(**architecture), random_ids(2, 7)
    mask = left_padding(0, 3, size=7)
    for search in (dict(num_beams=1), dict(num_beams=3)):
        cached = model.generate(ids, attention_mask=mask, **SETTINGS, **search)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **SETTINGS, **search))


@pytest.mark.parametrize("router", ["none", "expert_choice", "threshold_choice", "token_choice"])
def test_a_padded_row_generates_what_it_generates_alone(router):
    model, ids = tiny_model(router=router, sharing="middle_cycle"), random_ids(2, 9)
    mask = left_padding(4, 0, size=9)
    together = model.generate(ids, attention_mask=mask, **SETTINGS)
    alone = model.generate(ids[:1, 4:], attention_mask=torch.ones(1, 5, dtype=torch.long), **SETTINGS)
    assert together[0, 9:].tolist() == alone[0, 5:].tolist()


@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
def test_generation_continues_from_a_returned_cache(kv_cache):
    model, ids = tiny_model(router="expert_choice", kv_cache=kv_cache), random_ids(2, 6)
    mask = left_padding(0, 2, size=6)
    settings = SETTINGS | dict(eos_token_id=None)
    whole = model.generate(ids, attention_mask=mask, **settings)
    half = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings | dict(max_new_tokens=4))
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    rest = model.generate(
        half.sequences, attention_mask=mask, **settings | {CACHE_NAME: half[CACHE_NAME], "max_new_tokens": 4}
    )
    assert torch.equal(rest, whole)


def test_sampling_is_reproducible_and_prompt_lookup_equals_greedy():
    model, ids = tiny_model(router="expert_choice"), random_ids(1, 6)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(ids, max_new_tokens=6, do_sample=True, top_k=20, num_return_sequences=2))
    assert torch.equal(*draws) and draws[0].shape == (2, 12)
    greedy = model.generate(ids, **SETTINGS)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **SETTINGS), greedy)


def test_the_budget_reaches_generation():
    model, ids = tiny_model(router="expert_choice"), random_ids(1, 12)
    calibrate(model, [random_ids(16, 32, seed=5)])
    held = []
    for mean_depth in (1.0, 2.0, 3.0):
        output = model.generate(ids, mean_depth=mean_depth, return_dict_in_generate=True, **SETTINGS)
        held.append(output[CACHE_NAME].kv_bytes())
    assert held[0] < held[1] < held[2]
    with pytest.raises(ValueError, match=r"impossible: this model can do 1\.000 to 3\.000"):
        model.generate(ids, mean_depth=3.5, **SETTINGS)


def test_what_generation_cannot_honour_is_refused():
    model, ids = tiny_model(router="expert_choice"), random_ids(1, 4)
    with pytest.raises(ValueError, match="needs a calibrated model"):
        model.generate(ids, mean_depth=1.5, **SETTINGS)
    with pytest.raises(ValueError, match="looks into the future"):
        model.generate(ids, decision="top_k", **SETTINGS)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", **SETTINGS)
