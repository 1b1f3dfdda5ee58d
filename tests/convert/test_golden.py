"""The authors' code, number by number: every tensor of every golden file, from training and `top_k` evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.convert.official import from_official, official_names
from mor.convert.official_options import official_options
from mor.model.modeling_mor import MorForCausalLM
from mor.model.recursion import RecursionOutput
from mor.model.routing import RecursionTrace
from tests.golden.files import Golden, golden_names
from tests.golden.restatement import AuthorsModel, random_weights

RELATIVE = 1e-5

GOLDENS = [Golden(name) for name in golden_names()]
# The released expert-choice code does not share attention between recursions: not a Mixture-of-Recursions model.
UNTIED = [golden for golden in GOLDENS if golden.info.get("attention_retied_across_recursions") is False]
# Random scores are drawn from the generator of the authors' run.
FITTING = [golden for golden in GOLDENS if golden not in UNTIED and not golden.options["mor"]["rand_router"]]


def named(golden: Golden) -> str:
    return golden.name


@pytest.mark.parametrize("golden", FITTING, ids=named)
def test_everything_the_authors_code_computed(golden: Golden) -> None:
    model = from_official(golden.options, golden.parameters, dimensions=golden.dimensions)
    set_training_forwards(model, golden)
    input_ids = golden.tensors["input_ids"]
    official = replace(official_options(golden.options, dimensions=golden.dimensions), config=model.config)
    found = train(model, input_ids) | gradients(model, official_names(official, golden.parameters))
    assert_agree(found, golden.outputs("train"), f"{golden.name}, train")
    assert_agree(evaluate(model, input_ids), golden.outputs("eval"), f"{golden.name}, eval")


@pytest.mark.parametrize("golden", FITTING, ids=named)
def test_parameters_are_as_many_as_the_authors(golden: Golden) -> None:
    model = from_official(golden.options, golden.parameters, dimensions=golden.dimensions)
    bias = sum(t.numel() for name, t in golden.parameters.items() if name.endswith("router_bias"))
    # The balancing bias is a parameter of theirs without a gradient, and a buffer of ours.
    assert golden.info["unique_param_count"] - sum(p.numel() for p in model.parameters()) in (0, bias)


@pytest.mark.parametrize("golden", UNTIED, ids=named)
@pytest.mark.parametrize("untied", ["first", "average"])
def test_attention_that_is_not_shared_cannot_be_represented(golden: Golden, untied: Any) -> None:
    with pytest.raises(ValueError, match="attention that is not shared between recursions"):
        from_official(golden.options, golden.parameters, dimensions=golden.dimensions)
    model = from_official(golden.options, golden.parameters, dimensions=golden.dimensions, untied=untied)
    difference = (evaluate(model, golden.tensors["input_ids"])["logits"] - golden.tensors["eval/logits"]).abs().max()
    assert difference > 0.1, "another function, which the caller has to ask for by name"


@pytest.mark.parametrize("phase", ["train", "eval"])
@pytest.mark.parametrize("golden", [*FITTING, *UNTIED], ids=named)
def test_the_restatement_is_the_authors_code(golden: Golden, phase: str) -> None:
    weights = golden.aliased_parameters
    authors = AuthorsModel(
        options=golden.options, dimensions=golden.dimensions, weights=weights, training=phase == "train"
    )
    found = authors.forward(golden.tensors["input_ids"])
    known = golden.outputs(phase)
    assert {"logits", "loss_lm"} <= known.keys() & found.keys()
    assert_agree(found, {name: known[name] for name in known.keys() & found.keys()}, golden.name)


# Options of the authors that no golden file has, each with the sections it changes.
CASES: dict[str, dict[str, Any]] = {
    "recursive-cycle": {"recursive": {"sharing": "cycle"}},
    "recursive-middle_sequence": {"recursive": {"sharing": "middle_sequence"}},
    "recursive-sequence-kv": {"recursive": {"sharing": "sequence"}, "kv_sharing": {"enable": True}},
    "recursive-cycle-kv": {"recursive": {"sharing": "cycle"}, "kv_sharing": {"enable": True}},
    "expert-cycle": {"recursive": {"sharing": "cycle"}, "mor": {"enable": True}},
    "expert-2": {"recursive": {"num_recursion": 2}, "mor": {"enable": True, "capacity": None}},
    "expert-cycle-kv": {"recursive": {"sharing": "cycle"}, "kv_sharing": {"enable": True}, "mor": {"enable": True}},
    "expert-hybrid": {"kv_sharing": {"enable": True, "update_cache": True}, "mor": {"enable": True}},
    "expert-low-capacity": {"mor": {"enable": True, "capacity": "0.7,0.4,0.03"}},
    "expert-low-capacity-kv": {"kv_sharing": {"enable": True}, "mor": {"enable": True, "capacity": "0.7,0.5,0.5"}},
    "expert-low-capacity-hybrid": {
        "kv_sharing": {"enable": True, "update_cache": True},
        "mor": {"enable": True, "capacity": "0.8,0.5,0.3"},
    },
    "expert-tanh": {"mor": {"enable": True, "expert": {"router_func": "tanh", "alpha": 0.5}}},
    "expert-identity": {"mor": {"enable": True, "expert": {"router_func": None}}},
    "expert-additive": {"mor": {"enable": True, "expert": {"gating": "additive"}}},
    "expert-aux_router": {"mor": {"enable": True, "expert": {"sampling": "aux_router"}}},
    "expert-mlp-temp": {"mor": {"enable": True, "router_type": "mlp", "temp": 2.0}},
    "expert-wide_mlp-aux_router": {
        "mor": {"enable": True, "router_type": "wide_mlp", "temp": 0.5, "expert": {"sampling": "aux_router"}}
    },
    "expert-z_loss": {"mor": {"enable": True, "z_loss": True, "z_coeff": 0.01}},
    "expert-warmup-1": {"mor": {"enable": True, "expert": {"cap_warmup_step": 5}}, "step": 1},
    "expert-warmup-3": {"mor": {"enable": True, "expert": {"cap_warmup_step": 5}}, "step": 3},
    "expert-warmup-9": {"mor": {"enable": True, "expert": {"cap_warmup_step": 5}}, "step": 9},
    "token-2": {"recursive": {"num_recursion": 2}, "mor": {"enable": True, "type": "token"}},
    "token-cycle": {"recursive": {"sharing": "cycle"}, "mor": {"enable": True, "type": "token"}},
    "token-kv": {"kv_sharing": {"enable": True}, "mor": {"enable": True, "type": "token"}},
    "token-kv-ignores-update_cache": {
        "kv_sharing": {"enable": True, "update_cache": True},
        "mor": {"enable": True, "type": "token"},
    },
    "token-sigmoid": {"mor": {"enable": True, "type": "token", "token": {"router_func": "sigmoid", "alpha": 0.5}}},
    "token-additive": {"mor": {"enable": True, "type": "token", "token": {"gating": "additive"}}},
    "token-loss_free": {"mor": {"enable": True, "type": "token", "token": {"balancing": "loss_free"}}},
    "token-mlp-z_loss-temp": {
        "mor": {"enable": True, "type": "token", "router_type": "mlp", "temp": 2.0, "z_loss": True, "z_coeff": 0.01}
    },
    "token-warmup-4": {"mor": {"enable": True, "type": "token", "token": {"bal_warmup_step": 5}}, "step": 4},
    "token-warmup-5": {"mor": {"enable": True, "type": "token", "token": {"bal_warmup_step": 5}}, "step": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_everything_the_restatement_computes(case: str) -> None:
    step = CASES[case].get("step", 1)
    options = changed(changed(Golden("c_expert").options, {"mor": {"enable": False}}), CASES[case])
    dimensions = Golden("c_expert").dimensions
    if not options["recursive"]["sharing"].startswith("middle"):
        dimensions = dimensions | {"num_hidden_layers": 6}
    weights = random_weights(options, dimensions, tied=options["mor"]["enable"])
    input_ids = torch.randint(dimensions["vocab_size"], (2, 24))
    model = from_official(options, weights, dimensions=dimensions)
    if model.model.recursion.router is not None:
        model.model.recursion.router.training_forwards.fill_(step - 1)

    authors = AuthorsModel(options=options, dimensions=dimensions, weights=weights, training=True, training_step=step)
    expected, expected_grads = differentiated(authors, input_ids)
    official = replace(official_options(options, dimensions=dimensions), config=model.config)
    found = train(model, input_ids) | gradients(model, official_names(official, weights))
    assert_agree(found, expected | expected_grads, f"{case}, train")

    authors.training = False
    with torch.no_grad():
        expected = authors.forward(input_ids)
    assert_agree(evaluate(model, input_ids), expected, f"{case}, eval")


def differentiated(authors: AuthorsModel, input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The restatement's outputs and gradients; each shared tensor counts once, under its first name."""
    leaves: dict[int, str] = {}
    for name, tensor in authors.weights.items():
        leaves.setdefault(id(tensor.requires_grad_()), name)
    found = authors.forward(input_ids)
    found["total_loss"].backward()
    grads = {name: authors.weights[name].grad for name in leaves.values()}
    return found, {f"grad/{name}": grad for name, grad in grads.items() if grad is not None}


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`options` with nested `changes`; keys that are not a section of the options are dropped."""
    merged = dict(options)
    for key, value in changes.items():
        if isinstance(value, dict):
            merged[key] = changed(options[key], value)
        elif key in options:
            merged[key] = value
    return merged


def set_training_forwards(model: MorForCausalLM, golden: Golden) -> None:
    """Put the warm-up counter where it was; of the two ways to count, take the one that gives the recorded k."""
    step = golden.info.get("training_step_at_forward") or 1
    router = model.model.recursion.router
    if router is None:
        return
    expected = golden.info["train_info"].get("k_per_recursion")
    if expected is not None:
        length = golden.tensors["input_ids"].shape[1]
        sizes = {s: [max(1, int(c * length)) for c in router.warm_capacities(s)] for s in (step, step + 1)}
        step = next(s for s, found in sizes.items() if found == expected)
    router.training_forwards.fill_(step - 1)


def train(model: MorForCausalLM, input_ids: Tensor) -> dict[str, Tensor]:
    """One training forward and backward over the whole batch, as the authors' trainer does it."""
    recursed: list[RecursionOutput] = []
    handle = model.model.recursion.register_forward_hook(lambda *args: recursed.append(args[2]))
    out = model.train()(input_ids, labels=input_ids, num_items_in_batch=input_ids.numel(), output_hidden_states=True)
    handle.remove()
    out.loss.backward()
    found = observed(model, out, recursed[0]) | router_losses(model, out)
    # The authors train the auxiliary router with a loss and an optimizer of its own.
    weights = model.config.router_loss_weights
    apart = out.losses["aux_router"] * weights["aux_router"] if "aux_router" in out.losses else 0.0
    return found | {"total_loss": out.loss - apart}


@torch.no_grad()
def evaluate(model: MorForCausalLM, input_ids: Tensor) -> dict[str, Tensor]:
    recursed: list[RecursionOutput] = []
    handle = model.model.recursion.register_forward_hook(lambda *args: recursed.append(args[2]))
    router = model.model.recursion.router
    decision = "top_k" if router is not None and "top_k" in router.decisions else None
    out = model.eval()(input_ids, labels=input_ids, decision=decision, output_hidden_states=True)
    handle.remove()
    return observed(model, out, recursed[0])


def observed(model: MorForCausalLM, out: Any, recursed: RecursionOutput) -> dict[str, Tensor]:
    """What a forward shows, by the golden files' names."""
    found = {"logits": out.logits, "loss_lm": out.losses["lm"], "depth": out.depths}
    if model.config.router == "token_choice":
        (trace,) = out.routing
        return found | {"hidden/r0": recursed.hidden[-1], "router_logits/r0": trace.logits_BA, "gate": trace.gate_BA}
    for trace in out.routing:
        r, batch = trace.recursion, trace.kept_BA.shape[0]
        found[f"hidden/r{r}"] = recursed.hidden[r]
        found[f"router_logits/r{r}"] = trace.logits_BA[..., None]
        found[f"aux_router_logits/r{r}"] = trace.decisive_BA[..., None]
        found[f"selected/r{r}"] = trace.token_index_BA[trace.kept_BA].view(batch, -1)
    return found


def router_losses(model: MorForCausalLM, out: Any) -> dict[str, Tensor]:
    """Router losses and statistics of a training forward; 0 where the authors' code reports a loss it does not have."""
    config, zero = model.config, torch.zeros(())
    found = {"router_z_loss": out.losses.get("router_z", zero), "balancing_loss": out.losses.get("balancing", zero)}
    for trace in out.routing:
        logits = trace.logits_BA if config.router == "token_choice" else trace.logits_BA[..., None]
        found[f"r{trace.recursion}/router_z_loss"] = logits.logsumexp(-1).square().mean()
    found |= {"sampling_loss": zero, "sampling_acc": zero, "sampling_topk_acc": zero, "balancing_ratio": zero}
    if config.router == "token_choice":
        share = torch.bincount(out.depths.flatten() - 1, minlength=config.num_recursions) / out.depths.numel()
        return found | {"balancing_ratio": share if config.balancing != "none" else zero}
    if config.router != "expert_choice":
        return found
    for trace in out.routing:
        for name, value in sampling_statistics(model, trace).items():
            found[f"r{trace.recursion}/{name}"] = value
            found[name] = found[name] + value / (1 if name == "sampling_loss" else config.num_recursions)
    total = out.losses.get("aux_router", out.losses.get("sampling"))
    if total is not None:
        torch.testing.assert_close(total, found["sampling_loss"], rtol=RELATIVE, atol=0.0)
    return found


def sampling_statistics(model: MorForCausalLM, trace: RecursionTrace) -> dict[str, Tensor]:
    """How well a router foresees its own top-k: loss, accuracy, and the auxiliary router's overlap."""
    kept = trace.kept_BA.float()
    logits = trace.decisive_BA
    found = {
        "sampling_loss": F.binary_cross_entropy_with_logits(logits, kept),
        "sampling_acc": ((logits >= predicted_from(model)) == trace.kept_BA).float().mean(),
    }
    if model.config.causal_method == "aux_router":
        size = int(trace.kept_BA[0].sum())
        overlap = trace.kept_BA.gather(1, logits.topk(size, dim=1).indices)
        found["sampling_topk_acc"] = overlap.float().mean()
    return found


def predicted_from(model: MorForCausalLM) -> float:
    """The logit from which the authors count a token as predicted."""
    plain = model.config.router_activation == "identity" and model.config.causal_method == "aux_loss"
    return 0.5 if plain else 0.0


def gradients(model: MorForCausalLM, names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Gradients by the authors' names, and the norm of all that come from the total loss."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {f"grad/{theirs}": grads[name] for name in names if name in grads for theirs in names[name]}
    main = [grad for name, grad in grads.items() if ".auxiliary_heads." not in name]
    return found | {"grad_global_l2": torch.stack([grad.norm() for grad in main]).norm()}


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Every expected tensor is there, integers are equal, and floats agree to 1e-5 of the tensor's largest value
    (float64 runs show the authors' float32 numbers to be exact to no more than 3e-6 of it)."""
    wrong = []
    for name, tensor in expected.items():
        if name not in found:
            wrong.append(f"{name}: not computed")
        elif found[name].shape != tensor.shape:
            wrong.append(f"{name}: shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
        elif not tensor.is_floating_point():
            if not torch.equal(found[name], tensor):
                wrong.append(f"{name}: {int((found[name] != tensor).sum())} differ")
        else:
            tensor = tensor.detach()
            error = float((found[name].detach() - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3))
            if not error <= RELATIVE:
                wrong.append(f"{name}: relative error {error:.1e}")
    assert wrong == [], where
