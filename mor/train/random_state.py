"""The state of every random generator a run may draw from, as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, what other libraries draw from
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators' states now: tensors (`torch`, `cuda.{i}`, `numpy`) and what JSON can hold."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, next_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {
        "numpy": [algorithm, int(position), int(has_gauss), float(gauss)],
        "python": [version, next_gauss],
    }


def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put all generators back to a state from `capture`. GPUs that were not there then keep their own."""
    torch.set_rng_state(tensors["torch"])
    algorithm, position, has_gauss, gauss = values["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((algorithm, keys, position, has_gauss, gauss))  # noqa: NPY002
    version, next_gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            if f"cuda.{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed the generators of a process that trains beside others, each from numbers of its own."""
    if rank:
        seed_all(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def capture_device(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training draws from on `device`."""
    states = {"torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_device(states: dict[str, Tensor], device: torch.device) -> None:
    """Put them back."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
