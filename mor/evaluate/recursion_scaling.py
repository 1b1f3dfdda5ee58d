"""Test-time scaling: what every token gains from one more recursion of the same block, and from more than it was
trained with.

All tokens take the same number of recursions, so no router decides; a mean depth that the router spends as it likes is
what `mor evaluate --mean-depth` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor.evaluate.slices import ratio
from mor.model.configuration_mor import WITH_CAPACITIES, MorConfig
from mor.model.decision import DecisionRule, Threshold
from mor.model.modeling_mor import MorForCausalLM
from mor.model.scoring import score_tokens


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """`nll` in nats with its standard error over rows when every token takes `recursions`; `is_trained`: not more than
    the model was trained with."""

    recursions: int
    nll: float
    nll_error: float
    is_trained: bool


def can_scale(model: MorForCausalLM) -> bool:
    """Whether the number of recursions can be set: with routers that threshold scores, and without a router."""
    return model.config.num_recursions > 1 and model.config.router in (*WITH_CAPACITIES, "none")


@torch.no_grad()
def recursion_scaling(model: MorForCausalLM, batches: Sequence[Tensor], *, beyond: int = 1) -> list[ScalingPoint]:
    """NLL at 1 to R recursions for all tokens, and without a router also at up to `beyond` more.

    A router scores a recursion with weights of its own, so a model with one cannot go beyond R.

    Raises ValueError for a model that `can_scale` says cannot, and without rows.
    """
    trained = model.config.num_recursions
    if not can_scale(model):
        raise ValueError(f"router={model.config.router!r} with {trained} recursions has no number of them to set")
    most = trained + (beyond if model.config.router == "none" else 0)
    return [_point(model, batches, number) for number in range(1, most + 1)]


def with_recursions(model: MorForCausalLM, number: int) -> MorForCausalLM:
    """A model without a router that applies the same weights `number` times."""
    plan = model.config.depth_plan
    config: dict[str, Any] = model.config.to_dict()
    outside = plan.num_layers - plan.num_recursions * plan.block_size
    changed: dict[str, Any] = {"num_recursions": number, "num_hidden_layers": outside + number * plan.block_size}
    with model.device:  # where initial weights, which are replaced, cost least
        built = MorForCausalLM(MorConfig(**config | changed))
    torch.nn.Module.to(built, device=model.device, dtype=model.dtype)
    built.load_state_dict(model.state_dict())
    return built.eval()


def _point(model: MorForCausalLM, batches: Sequence[Tensor], number: int) -> ScalingPoint:
    trained = model.config.num_recursions
    decision: str | DecisionRule = "causal"
    if model.config.router == "none":
        chosen = model if number == trained else with_recursions(model, number)
    else:
        chosen = model
        goes_on = torch.tensor([-torch.inf if r < number else torch.inf for r in range(trained)], device=model.device)
        decision = Threshold(thresholds=goes_on)
    losses, rows, start = list[Tensor](), list[Tensor](), 0
    for rows_BT in batches:
        ids_BT = rows_BT.to(model.device)
        losses.append(score_tokens(chosen, ids_BT, decision=decision).nll_BT[:, 1:].flatten())
        rows.append(torch.arange(start, start + len(ids_BT)).repeat_interleave(ids_BT.shape[1] - 1))
        start += len(ids_BT)
    if not losses:
        raise ValueError("a scaling curve needs rows of tokens")
    nll_M = torch.cat(losses).cpu()
    nll, error = ratio(nll_M, torch.ones_like(nll_M), torch.cat(rows))
    return ScalingPoint(recursions=number, nll=nll, nll_error=error, is_trained=number <= trained)
