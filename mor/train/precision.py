"""Where a run computes, and in which number format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mor.train.options import Precision


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if there is one, else the CPU. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}; try 'auto'") from error
    return device


def choose_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. ValueError when `bfloat16` is asked of a device without it."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and not has_bfloat16:
        raise ValueError(
            f"precision='bfloat16' needs a CUDA device that has it, and the device is {device}; use 'auto'"
        )
    return torch.bfloat16 if has_bfloat16 and name != "float32" else torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context for a forward pass: weights stay float32, matrix products run in `dtype`."""
    if dtype == torch.float32:
        yield
        return
    with warnings.catch_warnings(), torch.autocast(device.type, dtype=dtype):
        # Norms keep float32 weights on a bfloat16 stream by intention; compiled code fuses them all the same.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        yield
