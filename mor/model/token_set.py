"""Which tokens of each row take part, and moving their vectors in and out.

Legend: B rows, T tokens of a row, K members of a set (the most any row has), D features.

Members of a row stand in causal order with its absent places at the end, so causal attention over a gathered set needs
no mask: a real member never sees an absent one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 64


class HostCounts:
    """Small integers on their way from the device to the host.

    The copy starts at once and is waited for when a number is asked for: by then the device has work queued behind it,
    so it does not idle.
    """

    def __init__(self, counts: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._counts = counts
        if counts.is_cuda:
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __getitem__(self, index: int) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._counts[index])

    def places(self, index: int, most: int, *, is_training: bool) -> int:
        """Places for that many tokens, at most `most`. In training rounded up to a few sizes, as compiled code and
        attention kernels like them."""
        step = _ROUNDING if is_training else 1
        return min(most, -(-self[index] // step) * step)


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """A few numbers as a tensor on `device`, which is not waited for."""
    tensor = torch.tensor(values, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


class _Gather(torch.autograd.Function):
    """`x.gather(1, index)` for an index without repetition along dimension 1. Unlike torch's own it does not keep `x`
    for the backward pass, and its gradient is a plain scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(1, index)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient[0].new_zeros(ctx.shape).scatter_(1, index, gradient[0]), None


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """A subset of the T tokens of each of B rows.

    `index_BK`: the members, ascending, in places `valid_BK`; None means all T tokens in order.
    `valid_BK`: which places are real; None means all.
    """

    index_BK: Tensor | None = None
    valid_BK: Tensor | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every token of every row is a member."""
        return self.index_BK is None and self.valid_BK is None

    @property
    def is_empty(self) -> bool:
        """Whether no row has a member."""
        return self.index_BK is not None and self.index_BK.shape[1] == 0

    @classmethod
    def from_mask(cls, member_BT: Tensor, size: int | None = None) -> TokenSet:
        """The tokens where `member_BT` is true, in `size` places; None: as many as the longest row needs, which is read
        from the device."""
        count_B = member_BT.sum(1)
        if size is None:
            size = int(count_B.max()) if count_B.numel() else 0
        index_BK = torch.argsort(~member_BT, dim=1, stable=True)[:, :size]
        valid_BK = torch.arange(size, device=member_BT.device) < count_B[:, None]
        return cls(index_BK=index_BK, valid_BK=valid_BK)

    @classmethod
    def from_even_mask(cls, member_BT: Tensor, size: int) -> TokenSet:
        """The tokens where `member_BT` is true: `size` in every row, so that no place is empty."""
        if size == member_BT.shape[1]:
            return cls()
        return cls(index_BK=cls.from_mask(member_BT, size).index_BK)

    @classmethod
    def top(cls, score_BT: Tensor, size: int) -> TokenSet:
        """The `size` best-scored tokens of each row, in causal order; all rows have as many."""
        if size == score_BT.shape[1]:
            return cls()
        return cls(index_BK=torch.topk(score_BT, size, dim=1, sorted=False).indices.sort(dim=1).values)

    def compose(self, inner: TokenSet) -> TokenSet:
        """The set that picks `inner` out of this set's members, as a set of the T tokens."""
        index_BK, valid_BK = self.index_BK, inner.valid_BK
        if inner.index_BK is None:
            return self if valid_BK is None else TokenSet(index_BK=index_BK, valid_BK=valid_BK)
        index_BK = inner.index_BK if index_BK is None else index_BK.gather(1, inner.index_BK)
        return TokenSet(
            index_BK=index_BK, valid_BK=valid_BK if valid_BK is not None else self._valid_at(inner.index_BK)
        )

    def _valid_at(self, index_BK: Tensor) -> Tensor | None:
        return None if self.valid_BK is None else self.valid_BK.gather(1, index_BK)

    def gather(self, x_BTX: Tensor) -> Tensor:
        """Members' entries of (B, T) or (B, T, D): (B, K) or (B, K, D). A batch of 1 is shared by all rows."""
        if self.index_BK is None:
            return x_BTX
        if x_BTX.shape[0] == 1 and self.index_BK.shape[0] > 1:
            return x_BTX[0][self.index_BK]
        index = self.index_BK if x_BTX.dim() == 2 else self.index_BK[..., None].expand(-1, -1, x_BTX.shape[-1])
        return _Gather.apply(x_BTX, index)  # type: ignore[no-any-return]

    def add(self, x_BTX: Tensor, delta_BKX: Tensor) -> Tensor:
        """`x` with `delta` added at the members; absent places add nothing."""
        if self.valid_BK is not None:
            valid = self.valid_BK if delta_BKX.dim() == 2 else self.valid_BK[..., None]
            delta_BKX = delta_BKX.masked_fill(~valid, 0)
        if self.index_BK is None:
            return x_BTX + delta_BKX
        index = self.index_BK if delta_BKX.dim() == 2 else self.index_BK[..., None].expand_as(delta_BKX)
        return x_BTX.scatter_add(1, index, delta_BKX.to(x_BTX.dtype))

    def put(self, x_BTX: Tensor, new_BKX: Tensor) -> Tensor:
        """`x` (B, T, D) with the members' entries replaced; absent places replace nothing."""
        if self.is_everything:
            return new_BKX
        if self.valid_BK is not None:
            new_BKX = torch.where(self.valid_BK[..., None], new_BKX, self.gather(x_BTX))
        if self.index_BK is None:
            return new_BKX
        return x_BTX.scatter(1, self.index_BK[..., None].expand_as(new_BKX), new_BKX)

    def spread(self, x_BKX: Tensor, num_tokens: int) -> Tensor:
        """Members' entries put back into a zero (B, T, ...) tensor."""
        return self.add(x_BKX.new_zeros(x_BKX.shape[0], num_tokens, *x_BKX.shape[2:]), x_BKX)

    def places(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The members' token indices (B, K), written out; `shape` is (B, T)."""
        if self.index_BK is not None:
            return self.index_BK
        return torch.arange(shape[1], device=device).expand(shape)

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        """True at the members; `shape` is (B, T)."""
        if self.is_everything:
            return torch.ones(shape, dtype=torch.bool, device=device)
        places_BK = self.places(shape, device)
        return self.spread(torch.ones_like(places_BK, dtype=torch.int32), shape[1]).bool()

    def active_rows(self) -> Tensor | None:
        """Indices of the rows that have a member; None when all have. Reads them from the device."""
        if self.valid_BK is None:
            return None
        active_B = self.valid_BK.any(1)
        return None if bool(active_B.all()) else active_B.nonzero().squeeze(1)
