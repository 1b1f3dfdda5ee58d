"""Tensors whose rows lie on different ranks (FSDP2's `DTensor`), cut from and put together to whole ones.

Only what FSDP2 makes: rows (dimension 0) dealt out in equal runs along the last dimension of a mesh, the last ones
shorter or empty; along a first dimension, if there is one, are copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over ranks."""
    return isinstance(tensor, DTensor)


def local_rows(tensor: Tensor) -> Tensor:
    """The rows on this rank; all of a tensor that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_value(tensor: Tensor) -> Tensor:
    """The value on every rank: of a norm of spread tensors, for instance."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def row_range(tensor: DTensor) -> tuple[int, int]:
    """The rows, from start to stop, that lie on this rank."""
    mesh, length = tensor.device_mesh, tensor.shape[0]
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def gather_to(tensor: DTensor, owner: int) -> Tensor | None:
    """The whole tensor, on `owner`'s host; None elsewhere. All ranks must call it.

    Only the owner receives: an all-gather would carry the whole tensor to every rank. It reads its own copy.
    """
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    members = dist.get_process_group_ranks(group)
    if owner not in members:
        return None
    each = -(-tensor.shape[0] // len(members))
    padded = local.new_zeros((each, *tensor.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in members] if dist.get_rank() == owner else None
    dist.gather(padded, parts, dst=owner, group=group)
    return None if parts is None else torch.cat(parts)[: tensor.shape[0]].cpu()


def part_like(parameter: Tensor, stored: Mapping[str, Tensor], name: str) -> Tensor:
    """The stored whole tensor `name`, spread as `parameter` is; only the rows on this rank are read.

    `stored` may read rows by itself, with a method `rows(name, start, stop)`.
    """
    if not isinstance(parameter, DTensor):
        return stored[name]
    start, stop = row_range(parameter)
    read = getattr(stored, "rows", None)
    rows = stored[name][start:stop] if read is None else read(name, start, stop)
    local = rows.to(parameter.to_local().device)
    shape = parameter.shape
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=parameter.stride()
    )
