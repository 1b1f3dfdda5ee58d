"""The language-modelling loss in chunks of rows, so that the logits never exist whole.

The gradient of a chunk is taken as soon as its loss is known: three matrix products, none repeated. The kernels of
Liger and Cut Cross-Entropy do the same, but count the targets on the host, which makes it wait for the device in every
step.

Legend: N rows (all columns of a batch), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mor.model.lm_loss import LmLoss

IGNORED = -100


def chunk_gradient(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk, and its gradient in the logits (softmax minus one at the target), in their dtype."""
    counted_C1 = (target_C != IGNORED).unsqueeze(1)
    index_C1 = target_C.clamp(min=0).unsqueeze(1)
    logits = logits_CV.float()
    log_sum_C1 = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = ((log_sum_C1 - logits.gather(1, index_C1)) * counted_C1).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = ((logits - log_sum_C1).exp() - (columns == index_C1).float()) * counted_C1
    return loss, gradient.to(logits_CV.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, chunk: int, gradient_of: Any) -> Tensor:
        loss = torch.zeros((), device=hidden_ND.device)
        hidden_gradient = torch.empty_like(hidden_ND)
        head_gradient = torch.zeros(head_VD.shape, device=head_VD.device)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            part, gradient_CV = gradient_of(hidden_ND[rows] @ head_VD.T, target_N[rows])
            loss += part
            torch.mm(gradient_CV, head_VD, out=hidden_gradient[rows])
            head_gradient += gradient_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * scale[0], head_gradient * scale[0], None, None, None


class ChunkedLmLoss:
    """Sum of token losses from hidden states and head, `chunk` rows of logits at a time.

    `compiled`: fuse the passes over a chunk's logits; for CUDA.
    """

    def __init__(self, *, chunk: int = 2048, compiled: bool = True) -> None:
        self._chunk = chunk
        self._gradient_of = torch.compile(chunk_gradient, fullgraph=True) if compiled else chunk_gradient

    def __call__(self, hidden_BSD: Tensor, head_VD: Tensor, target_BS: Tensor) -> Tensor:
        device = hidden_BSD.device.type
        if torch.is_autocast_enabled(device):
            hidden_BSD, head_VD = (t.to(torch.get_autocast_dtype(device)) for t in (hidden_BSD, head_VD))
        with torch.autocast(device, enabled=False):
            rows = (hidden_BSD.flatten(0, 1), head_VD, target_BS.flatten())
            return _ChunkedLoss.apply(*rows, self._chunk, self._gradient_of)  # type: ignore[no-any-return]


def choose_lm_loss(device: torch.device) -> LmLoss | None:
    """The loss to train with: in chunks on CUDA, elsewhere None: the model's own."""
    return ChunkedLmLoss() if device.type == "cuda" else None
