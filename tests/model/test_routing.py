import copy
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mor.model.cache import MorCache
from mor.model.expert_choice import hashed_uniform
from tests.tiny import VOCABULARY, left_padding, random_ids, tiny_model


def router_of(model):
    return model.model.recursion.router


def test_selected_sets_are_nested_and_as_large_as_the_capacities():
    model, ids = tiny_model(router="expert_choice").train(), random_ids(3, 24)
    traces = model(ids).routing
    sets = [set(t.token_index_BA[1][t.kept_BA[1]].tolist()) for t in traces]
    assert [len(s) for s in sets] == [24, 16, 8]
    assert sets[0] >= sets[1] >= sets[2]


def test_padding_takes_no_place_and_k_counts_real_tokens():
    model, ids, mask = tiny_model(router="expert_choice").train(), random_ids(3, 24), left_padding(0, 9, 18, size=24)
    output = model(ids, attention_mask=mask)
    assert (output.depths[mask == 0] == 0).all()
    for row, real in enumerate((24, 15, 6)):
        assert [(output.depths[row] > r).sum().item() for r in range(3)] == [real, int(real * 2 / 3), int(real / 3)]
        alone = model(ids[row : row + 1, 24 - real :])
        assert torch.equal(alone.depths[0], output.depths[row, 24 - real :])
        torch.testing.assert_close(alone.logits[0], output.logits[row, 24 - real :], atol=1e-5, rtol=1e-4)


def test_padding_changes_no_loss():
    ids = random_ids(2, 12)
    for router in ("expert_choice", "threshold_choice", "token_choice"):
        model = tiny_model(router=router, router_z_loss_coef=0.1).train()
        plain = model(ids, labels=ids)
        padded_ids = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
        mask = left_padding(5, 5, size=17)
        labels = padded_ids.masked_fill(left_padding(6, 6, size=17) == 0, -100)
        padded = model(padded_ids, attention_mask=mask, labels=labels)
        for name, loss in plain.losses.items():
            torch.testing.assert_close(padded.losses[name], loss, atol=1e-4, rtol=1e-4, msg=f"{router} {name}")


def test_capacity_warm_up_lives_in_the_state_dict(tmp_path):
    model, ids = tiny_model(router="expert_choice", capacity_warmup_steps=4).train(), random_ids(1, 30)
    sizes = [int((model(ids).depths > 2).sum()) for _ in range(2)]
    expected = [int((1 / 3 + 2 / 3 * 0.5 * (1 + math.cos(math.pi * t / 4))) * 30) for t in (1, 2, 3, 4, 5)]
    assert sizes == expected[:2]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    copied = copy.deepcopy(model)
    reloaded = tiny_model(router="expert_choice", capacity_warmup_steps=4).train()
    reloaded(ids)
    reloaded.load_state_dict(model.state_dict())
    for m in (loaded, copied, reloaded):
        assert [int((m(ids).depths > 2).sum()) for _ in range(2)] == expected[2:4]
    assert int((model.eval()(ids, decision="top_k").depths > 2).sum()) == 10


def test_auxiliary_router_learns_alone():
    model, ids = tiny_model(router="expert_choice", causal_method="aux_router").train(), random_ids(2, 12)
    losses = model(ids, labels=ids).losses
    assert "sampling" not in losses
    losses["aux_router"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("auxiliary_heads" in name), name


def test_auxiliary_router_decides_causally_and_the_main_one_gates():
    model, ids = tiny_model(router="expert_choice", causal_method="aux_router"), random_ids(2, 12)
    trace = model(ids).routing[1]
    assert torch.equal(trace.kept_BA, (trace.decisive_BA >= 0) & trace.valid_BA)
    torch.testing.assert_close(trace.gate_BA, 0.1 * trace.logits_BA.sigmoid())
    top_k = model(ids, decision="top_k").routing[1]
    assert top_k.kept_BA.sum() == 2 * 8 and not torch.equal(top_k.logits_BA, top_k.decisive_BA)


@pytest.mark.parametrize(("activation", "boundary"), [("sigmoid", 0.0), ("tanh", 0.0), ("identity", 0.5)])
def test_causal_threshold_is_where_the_activation_reaches_its_middle(activation, boundary):
    model, ids = tiny_model(router="expert_choice", router_activation=activation), random_ids(2, 20)
    trace = model(ids).routing[1]
    assert torch.equal(trace.kept_BA & trace.valid_BA, (trace.logits_BA >= boundary) & trace.valid_BA)
    gates = {
        "sigmoid": 0.1 * trace.logits_BA.sigmoid(),
        "tanh": 0.1 * trace.logits_BA.tanh(),
        "identity": trace.logits_BA,
    }
    torch.testing.assert_close(trace.gate_BA, gates[activation])


def test_loss_free_bias_moves_against_the_load_and_never_enters_the_gate():
    model = tiny_model(router="token_choice", balancing="loss_free", balancing_update_rate=0.5).train()
    ids, router = random_ids(4, 30), router_of(model)
    output = model(ids)
    load = torch.stack([(output.depths == d).float().mean() for d in (1, 2, 3)])
    model.update_router_bias()
    torch.testing.assert_close(router.load_bias, 0.5 * (1 / 3 - load).sign())
    router.load_bias.copy_(torch.tensor([0.0, 0.0, 100.0]))
    trace = model(ids).routing[0]
    torch.testing.assert_close(trace.gate_BA, trace.logits_BA.softmax(-1)[..., 2])
    before = router.load_bias.clone()
    router.load_sum.zero_()
    model.update_router_bias()
    assert torch.equal(router.load_bias, before)


def test_balancing_warm_up_sends_everyone_to_the_bottom():
    model, ids = tiny_model(router="token_choice", balancing_warmup_steps=3).train(), random_ids(2, 20)
    depths = [model(ids).depths for _ in range(3)]
    assert (depths[0] == 3).all() and (depths[1] == 3).all() and (depths[2] < 3).any()


def test_random_scores_are_uniform_and_repeat_only_outside_training():
    score = hashed_uniform(torch.arange(200_000), recursion=1, seed=0)
    assert abs(score.mean() - 0.5) < 0.005 and abs(score.var() - 1 / 12) < 0.002
    assert not torch.equal(score, hashed_uniform(torch.arange(200_000), recursion=2, seed=0))
    model, ids = tiny_model(router="random"), random_ids(1, 64)
    assert torch.equal(model(ids).depths, model(ids).depths)
    model.train()
    assert not torch.equal(model(ids).depths, model(ids).depths)


def test_fixed_depths_follow_positions():
    model, ids, mask = tiny_model(router="fixed", fixed_depths=[3, 1]), random_ids(2, 6), left_padding(0, 2, size=6)
    assert model(ids, attention_mask=mask).depths.tolist() == [[3, 1, 3, 1, 3, 1], [0, 0, 3, 1, 3, 1]]


def test_micro_batches_add_up_to_the_batch():
    for router in ("expert_choice", "threshold_choice", "token_choice"):
        # what looks at one micro-batch is left out: token-choice's balancing, threshold-choice's auxiliary loss
        left_out = {
            "expert_choice": {},
            "threshold_choice": {"causal_method": "none"},
            "token_choice": {"balancing": "none"},
        }
        model, ids = tiny_model(router=router, router_z_loss_coef=0.1, **left_out[router]).train(), random_ids(4, 12)
        whole = model(ids, labels=ids, num_items_in_batch=ids.numel()).loss
        parts = [model(part, labels=part, num_items_in_batch=ids.numel()).loss for part in ids.split(2)]
        torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
@pytest.mark.parametrize("depths", [[3], [1], [3, 1, 2], [2, 3, 1, 1, 1, 2, 3]], ids=str)
def test_fixed_depths_of_whole_rows_are_known_without_reading_a_tensor(depths, kv_cache):
    """Fake tensors have no values to be read; where there are values, training computes what evaluation does."""
    model, ids = tiny_model(router="fixed", fixed_depths=depths, kv_cache=kv_cache), random_ids(2, 25)
    evaluated = model(ids, use_cache=False)
    trained = model.train()(ids)
    torch.testing.assert_close(trained.logits, evaluated.logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(trained.depths, evaluated.depths)
    assert trained.depths.tolist() == [[depths[n % len(depths)] for n in range(25)]] * 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(inputs_embeds=torch.empty(2, 25, 32)).logits.shape == (2, 25, VOCABULARY)


def test_fixed_depths_go_on_where_the_cache_ends():
    """In training mode too: rows with unlike numbers of tokens have unlike sizes."""
    model, ids, mask = tiny_model(router="fixed", fixed_depths=[3, 1, 1]), random_ids(2, 9), left_padding(0, 2, size=9)
    whole = model(ids, attention_mask=mask, use_cache=False)
    for training in (False, True):
        model.train(training)
        cache = MorCache(model.config)
        model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        rest = model(ids[:, 5:], attention_mask=mask, past_key_values=cache)
        assert torch.equal(rest.depths, whole.depths[:, 5:])
        torch.testing.assert_close(rest.logits, whole.logits[:, 5:], atol=1e-5, rtol=1e-4)
