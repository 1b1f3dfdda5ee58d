"""Tensors in safetensors files, read one at a time when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of several files as one mapping; a name is in one file. SafetensorError for files that are none."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places: dict[str, Any] = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            self._places |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        # Copies stand at the allocator's alignment, as before they were saved: matrix products may round by it.
        return self._places[name].get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, without reading the others."""
        return self._places[name].get_slice(name)[start:stop].clone()

    def part(self, name: str) -> StoredTensors:
        """The tensors called `name`/..., under the rest of their names."""
        return _Part(self, f"{name}/")


class _Part(StoredTensors):
    def __init__(self, whole: StoredTensors, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._whole.rows(self._prefix + name, start, stop)
