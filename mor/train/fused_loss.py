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


def take_gradient(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Summed loss of a chunk. Its gradient in the logits (softmax minus one at the target) takes the logits' place."""
    counted_C1 = (target_C != IGNORED).unsqueeze(1)
    index_C1 = target_C.clamp(min=0).unsqueeze(1)
    logits = logits_CV.float()
    log_sum_C1 = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = ((log_sum_C1 - logits.gather(1, index_C1)) * counted_C1).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = ((logits - log_sum_C1).exp() - (columns == index_C1).float()) * counted_C1
    logits_CV.copy_(gradient)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, chunk: int, gradient_of: Any) -> Tensor:
        dtype = hidden_ND.dtype
        if torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden_ND, product_VD = hidden_ND.to(dtype), head_VD.to(dtype)
            loss = torch.zeros((), device=hidden_ND.device)
            hidden_gradient = torch.empty_like(hidden_ND)
            head_gradient = torch.zeros(head_VD.shape, device=head_VD.device)
            buffer_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(head_VD))
            for hidden_CD, out_CD, target_C in zip(*(t.split(chunk) for t in (hidden_ND, hidden_gradient, target_N))):
                logits_CV = torch.mm(hidden_CD, product_VD.T, out=buffer_CV[: len(hidden_CD)])
                loss += gradient_of(logits_CV, target_C)
                torch.mm(logits_CV, product_VD, out=out_CD)
                _add_product(head_gradient, logits_CV.T, hidden_CD)
        ctx.gradients = hidden_gradient, head_gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken already; compute the loss again")
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None  # scaled in place: a copy would stand beside them when memory is fullest
        return hidden_gradient.mul_(scale[0]), head_gradient.mul_(scale[0]), None, None, None


def _add_product(total_XY: Tensor, a_XC: Tensor, b_CY: Tensor) -> None:
    """total += a @ b in float32; CUDA adds inside the product, so that no rounded product is written first."""
    if total_XY.is_cuda and a_XC.dtype != total_XY.dtype:
        torch.addmm(total_XY, a_XC, b_CY, out_dtype=total_XY.dtype, out=total_XY)
    else:
        total_XY += a_XC @ b_CY


class ChunkedLmLoss:
    """Sum of token losses from hidden states and head, `chunk` rows of logits at a time.

    `compiled`: fuse the passes over a chunk's logits; for CUDA.
    """

    def __init__(self, *, chunk: int = 2048, compiled: bool = True) -> None:
        self._chunk = chunk
        self._gradient_of = torch.compile(take_gradient, fullgraph=True) if compiled else take_gradient

    def __call__(self, hidden_BSD: Tensor, head_VD: Tensor, target_BS: Tensor) -> Tensor:
        rows = (hidden_BSD.flatten(0, 1), head_VD, target_BS.flatten())
        return _ChunkedLoss.apply(*rows, self._chunk, self._gradient_of)  # type: ignore[no-any-return]


def choose_lm_loss(device: torch.device) -> LmLoss | None:
    """The loss to train with: in chunks on CUDA, elsewhere None: the model's own."""
    return ChunkedLmLoss() if device.type == "cuda" else None
