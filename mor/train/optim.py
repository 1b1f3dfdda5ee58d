"""AdamW with the paper's parameter groups, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mor.train.options import OptimizerOptions
from mor.train.sharded_tensor import part_like, whole_value

MAIN, UNDECAYED, AUXILIARY = "main", "undecayed", "auxiliary_router"


def group_of(name: str) -> str:
    """The group of the parameter `name`: norm weights and biases are not decayed, auxiliary routers are apart."""
    module, _, leaf = name.rpartition(".")
    if ".auxiliary_heads." in f".{name}":
        return AUXILIARY
    if leaf == "bias" or "norm" in module.rpartition(".")[2].lower():
        return UNDECAYED
    return MAIN


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Groups for AdamW, empty ones left out; tied parameters appear once.

    Each has `name`, `params` as (name, parameter) pairs, `weight_decay` and `scale`, its factor on the learning rate.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {MAIN: [], UNDECAYED: [], AUXILIARY: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name)].append((name, parameter))
    return [
        {
            "name": group,
            "params": named,
            "weight_decay": 0.0 if group == UNDECAYED else options.weight_decay,
            "scale": options.auxiliary_router_scale if group == AUXILIARY else 1.0,
        }
        for group, named in members.items()
        if named
    ]


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over the paper's groups."""
    return torch.optim.AdamW(
        parameter_groups(model, options),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group `learning_rate` times its scale."""
    for group in optimizer.param_groups:
        rate = learning_rate * group["scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def keep_learning_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Make the groups' learning rates tensors on `device`, which a CUDA graph reads at every replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)


@contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around the capture of an update. A fused one is the same either way, but torch asks for the flag."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> dict[str, Tensor]:
    """Clip auxiliary routers and the other parameters apart, each to `max_norm`; None only measures.

    Returns the L2 norms before clipping, `gradient_norm` and, where there are auxiliary routers,
    `auxiliary_gradient_norm`, as 0-d tensors on the parameters' device.
    """
    named = {
        "gradient_norm": _parameters(optimizer, (MAIN, UNDECAYED)),
        "auxiliary_gradient_norm": _parameters(optimizer, (AUXILIARY,)),
    }
    limit = float("inf") if max_norm is None else max_norm
    return {
        name: whole_value(nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=False))
        for name, parameters in named.items()
        if parameters
    }


def _parameters(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> list[Tensor]:
    return [p for group in optimizer.param_groups if group["name"] in names for p in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `{parameter name}/{exp_avg | exp_avg_sq | step}`; empty before the first step."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"])
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, whole tensors, spread as the parameters are.

    Raises ValueError when it belongs to other parameters.
    """
    named = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"])
    }
    found = {key.rpartition("/")[0] for key in tensors}
    if found and found != set(named):
        raise ValueError(f"the optimizer state differs from the model in {sorted(found ^ set(named))[0]!r}")
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(named.items()):
        if found:
            moments = {key: part_like(parameter, tensors, f"{name}/{key}") for key in ("exp_avg", "exp_avg_sq")}
            state[index] = {"step": tensors[f"{name}/step"], **moments}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
