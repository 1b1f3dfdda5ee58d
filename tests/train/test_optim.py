import copy

import pytest
import torch

from mor.train.optim import (
    AUXILIARY,
    MAIN,
    UNDECAYED,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)
from mor.train.options import OptimizerOptions
from tests.tiny import tiny_model


def groups_of(model, **options):
    groups = parameter_groups(model, OptimizerOptions(**options))
    return {group["name"]: group for group in groups}


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_everything_but_norms_and_biases_is_decayed():
    model = tiny_model(router="expert_choice", causal_method="aux_router", attention_bias=True)
    groups = groups_of(model)
    names = {group: {name for name, _ in groups[group]["params"]} for group in groups}
    assert sum(map(len, names.values())) == len(dict(model.named_parameters()))
    assert all("norm" in name or name.endswith(".bias") for name in names[UNDECAYED])
    assert {"model.norm.weight", "model.first_layers.0.self_attn.q_proj.bias"} <= names[UNDECAYED]
    assert {"model.embed_tokens.weight", "model.recursion.router.heads.2.0.weight"} <= names[MAIN]
    assert not any("norm" in name or name.endswith(".bias") for name in names[MAIN])
    assert names[AUXILIARY] == {f"model.recursion.router.auxiliary_heads.{r}.0.weight" for r in range(3)}
    assert {name: (g["weight_decay"], g["scale"]) for name, g in groups.items()} == {
        MAIN: (0.1, 1.0),
        UNDECAYED: (0.0, 1.0),
        AUXILIARY: (0.1, 10.0),
    }


def test_tied_and_frozen_parameters():
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert "lm_head.weight" not in dict(groups_of(tied)[MAIN]["params"])
    assert "lm_head.weight" in dict(groups_of(untied)[MAIN]["params"])
    tied.model.embed_tokens.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in dict(groups_of(tied)[MAIN]["params"])
    assert AUXILIARY not in groups_of(tied)


def test_adamw_has_the_papers_settings_and_the_auxiliary_router_ten_times_the_rate():
    model = tiny_model(router="expert_choice", causal_method="aux_router")
    optimizer = build_optimizer(model, OptimizerOptions())
    set_learning_rate(optimizer, 2e-3)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {MAIN: 2e-3, UNDECAYED: 2e-3, AUXILIARY: 2e-2}
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in optimizer.param_groups)


def test_one_step_is_adamw_by_hand():
    """First step: w <- (1 - lr * decay) w - lr * g / (|g| + eps)."""
    model = tiny_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = build_optimizer(model, OptimizerOptions(learning_rate=0.01))
    give_gradients(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if "norm" in name else 0.1
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_auxiliary_routers_are_clipped_apart():
    model = tiny_model(router="expert_choice", causal_method="aux_router")
    optimizer = build_optimizer(model, OptimizerOptions())
    give_gradients(model)
    is_auxiliary = {name: "auxiliary" in name for name, _ in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = clip_gradients(optimizer, 1.0)
    for part, key in ((False, "gradient_norm"), (True, "auxiliary_gradient_norm")):
        mine = [name for name in grads if is_auxiliary[name] == part]
        norm = torch.stack([grads[name].square().sum() for name in mine]).sum().sqrt()
        torch.testing.assert_close(norms[key], norm)
        for name in mine:
            torch.testing.assert_close(model.get_parameter(name).grad, grads[name] / norm, rtol=1e-4, atol=1e-7)


def test_no_clipping_only_measures():
    model = tiny_model()
    give_gradients(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = clip_gradients(build_optimizer(model, OptimizerOptions()), None)
    assert norms.keys() == {"gradient_norm"}
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


def test_the_state_survives_a_round_trip_bit_for_bit():
    model = tiny_model(router="expert_choice")
    optimizer = build_optimizer(model, OptimizerOptions())
    assert optimizer_tensors(optimizer) == {}
    give_gradients(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    twin_optimizer = build_optimizer(twin, OptimizerOptions())
    load_optimizer_tensors(twin_optimizer, {k: t.clone() for k, t in optimizer_tensors(optimizer).items()})
    for each, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        give_gradients(each, seed=1)
        its_optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a, b), name


def test_a_state_of_other_parameters_is_refused():
    model = tiny_model(router="expert_choice")
    optimizer = build_optimizer(model, OptimizerOptions())
    give_gradients(model)
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    load_optimizer_tensors(build_optimizer(tiny_model(router="expert_choice"), OptimizerOptions()), {})
    with pytest.raises(ValueError, match=r"differs from the model in 'model\.recursion\.router"):
        load_optimizer_tensors(build_optimizer(tiny_model(sharing="middle_cycle"), OptimizerOptions()), tensors)
