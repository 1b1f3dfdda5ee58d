"""A CUDA graph on the CPU: records operations with the tensors they worked on, and does them again on the same ones.

As on a GPU, a replay runs no Python, recording changes nothing, and what would need the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a capture cannot hold: values read from the device, sizes that depend on them, and values from the host.
FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default: "a value is read",
    torch.ops.aten.nonzero.default: "a size is read",
    torch.ops.aten.lift_fresh.default: "values are copied from the host",
}


def tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written(function: Any, arguments: tuple, keywords: dict) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(arguments[index] if index < len(arguments) else keywords.get(argument.name))


class Recording(TorchDispatchMode):
    """What was done while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._new: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in FORBIDDEN:
            raise RuntimeError(f"{function}: {FORBIDDEN[function]}")
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        for tensor in written(function, args, kwargs):
            if storage(tensor) not in self._new:
                self._before.setdefault(storage(tensor), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self._new |= {storage(tensor): tensor for tensor in tensors(result) if storage(tensor) not in given}
        self.done.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Put back what was there before."""
        for tensor, value in self._before.values():
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        """Do all again."""
        for function, args, kwargs, result in self.done:
            given = {storage(tensor) for tensor in tensors((args, kwargs))}
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                if storage(old) not in given:
                    old.detach().copy_(new)


class RecordingCapture:
    """`mor.train.step_graph.Capture` without a GPU."""

    def __init__(self, *, has_room: bool = True) -> None:
        self._has_room, self.steps_aside = has_room, 0
        self.recorded: list[Recording] = []

    def has_room(self) -> bool:
        return self._has_room

    def aside(self) -> Any:
        self.steps_aside += 1
        return nullcontext()

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        random, recording = torch.get_rng_state(), Recording()
        with recording:
            program()
        recording.undo()
        torch.set_rng_state(random)
        self.recorded.append(recording)
        return recording.replay
