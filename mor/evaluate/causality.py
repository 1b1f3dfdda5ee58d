"""The suffix probe: does what follows a token change what the model says at or before it?

A causal model answers no; the probe allows only for kernels that round differently when shapes change, which they do
because routed tokens are gathered. A model that decides by top-k answers yes, and its quality numbers are then not
those of a language model.

Legend: B rows of a probe batch (row 0 is the original), T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mor.model.modeling_mor import MorForCausalLM

RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe saw.

    `decision`: the rule it ran under. `num_suffixes`: changed suffixes tried. `num_changed`: those after which an
    earlier logit moved by more than `tolerance` times (1 + the greatest logit), or an earlier depth differed.
    `max_change`: greatest |change| of an earlier logit. `max_depth_change`: greatest change of an earlier depth.
    """

    decision: str
    num_suffixes: int
    num_changed: int
    max_change: float
    max_depth_change: int
    tolerance: float

    @property
    def causal(self) -> bool:
        """Whether nothing before a changed suffix moved."""
        return self.num_changed == 0

    def __str__(self) -> str:
        if self.causal:
            return f"causal: none of {self.num_suffixes} changed suffixes moved an earlier prediction"
        return (
            f"not causal: {self.num_changed} of {self.num_suffixes} changed suffixes moved earlier predictions, "
            f"logits by up to {self.max_change:.3g} and depths by up to {self.max_depth_change}"
        )


@torch.no_grad()
def suffix_probe(
    model: MorForCausalLM,
    input_ids: Tensor,
    *,
    decision: str = "causal",
    mean_depth: float | None = None,
    num_suffixes: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> ProbeResult:
    """Replace suffixes of random length by random tokens and compare everything before them with the original.

    Args:
        input_ids: (T,) or (1, T) real tokens, T at least 2.
        decision: the rule to probe, `causal` or `top_k`.
        mean_depth: budget, as in the model's forward.
        num_suffixes: how many to try, in batches of `batch_size`, each beside the original.

    Raises:
        ValueError: input that is not one row of at least two tokens.
    """
    original_T = input_ids.reshape(-1)
    if input_ids.dim() > 2 or (input_ids.dim() == 2 and len(input_ids) != 1) or len(original_T) < 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected one row of at least two tokens")
    generator = torch.Generator().manual_seed(seed)
    tally = _Tally()
    was_training = model.training
    model.eval()
    try:
        for start in range(0, num_suffixes, batch_size):
            count = min(batch_size, num_suffixes - start)
            changed_BT, cut_B = _changed_suffixes(original_T, count, model.config.vocab_size, generator)
            rows_BT = torch.cat([original_T[None], changed_BT]).to(model.device)
            output = model(rows_BT, use_cache=False, decision=decision, mean_depth=mean_depth)
            tally.add(output.logits.float(), output.depths, cut_B.to(model.device), _tolerance(model.dtype))
    finally:
        model.train(was_training)
    return ProbeResult(
        decision=decision,
        num_suffixes=num_suffixes,
        num_changed=tally.num_changed,
        max_change=tally.max_change,
        max_depth_change=tally.max_depth_change,
        tolerance=_tolerance(model.dtype),
    )


def _tolerance(dtype: torch.dtype) -> float:
    return RELATIVE_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)


def _changed_suffixes(
    original_T: Tensor, count: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` copies with random tokens from a random cut in 1..T-1 on, and the cuts; the token at the cut differs."""
    size = len(original_T)
    cut_B = torch.randint(1, size, (count,), generator=generator)
    noise_BT = torch.randint(0, vocab_size, (count, size), generator=generator)
    at_cut_B = original_T.cpu()[cut_B]
    shift_B = torch.randint(1, vocab_size, (count,), generator=generator) if vocab_size > 1 else torch.zeros_like(cut_B)
    noise_BT[torch.arange(count), cut_B] = (at_cut_B + shift_B) % vocab_size
    kept_BT = torch.arange(size) < cut_B[:, None]
    return torch.where(kept_BT, original_T.cpu(), noise_BT), cut_B


class _Tally:
    """Counts what moved, over batches whose row 0 is the original."""

    def __init__(self) -> None:
        self.num_changed, self.max_change, self.max_depth_change = 0, 0.0, 0

    def add(self, logits_BTV: Tensor, depths_BT: Tensor, cut_B: Tensor, tolerance: float) -> None:
        before_BT = torch.arange(logits_BTV.shape[1], device=cut_B.device) < cut_B[:, None]
        change_BT = (logits_BTV[1:] - logits_BTV[:1]).abs().amax(-1).masked_fill(~before_BT, 0)
        depth_BT = (depths_BT[1:] - depths_BT[:1]).abs().masked_fill(~before_BT, 0)
        allowed = tolerance * (1 + float(logits_BTV[0].abs().max()))
        self.num_changed += int(((change_BT.amax(1) > allowed) | (depth_BT.amax(1) > 0)).sum())
        self.max_change = max(self.max_change, float(change_BT.max()))
        self.max_depth_change = max(self.max_depth_change, int(depth_BT.max()))
