"""Kernels run on the CUDA device if there is one, else under Triton's interpreter."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch

from tests.engine.kernels.interpreter import repair

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported, so set before any test is

MODULES = ("append_decode", "draw", "few_rows", "fused", "paged_decode", "paged_prefill", "slot_steps", "some_rows")


@pytest.fixture(autouse=True)
def on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions take their kernel whatever device their tensors are on."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available():
        assert type(triton.language.sum).__name__ != "JITFunction", "triton was imported without its interpreter"
        repair(monkeypatch)
    for name in MODULES:
        monkeypatch.setattr(import_module(f"mor.engine.kernels.{name}"), "runs_kernel", lambda tensor: True)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
