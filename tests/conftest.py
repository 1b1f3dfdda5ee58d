"""What every test runs under: no network, one thread per worker, seeded random numbers."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported, so set before any test is

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported

hypothesis.settings.register_profile("mor", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("mor")


# What torch's own compiler says of itself, and of the mode that finds synchronisations.
OF_THE_COMPILER = (
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Synchronization debug mode is a prototype:UserWarning",
    r"ignore:\nOnline softmax is disabled on the fly:UserWarning",
    "ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a GPU compile: they bear the compiler's warnings."""
    for item in items:
        if item.get_closest_marker("gpu"):
            for message in OF_THE_COMPILER:
                item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(autouse=True)
def compiled_anew(request: pytest.FixtureRequest) -> None:
    """Nothing that an earlier test compiled."""
    if request.node.get_closest_marker("gpu"):
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (code under test may draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that would leave this machine fail at once."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address[0]}: tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Workers of pytest-xdist share the cores; more threads than cores only wait for each other."""
    torch.set_num_threads(1)
