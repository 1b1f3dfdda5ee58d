"""The inference engine: continuous depth-wise batching over a paged cache with one sequence per recursion.

from mor.engine import Engine, EngineOptions, SamplingParams
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.engine.engine import Engine
    from mor.engine.options import EngineOptions
    from mor.engine.outputs import RequestOutput, TokenOutput
    from mor.engine.params import SamplingParams

__all__ = ["Engine", "EngineOptions", "RequestOutput", "SamplingParams", "TokenOutput"]

_HOMES = {
    "Engine": "engine",
    "EngineOptions": "options",
    "RequestOutput": "outputs",
    "SamplingParams": "params",
    "TokenOutput": "outputs",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: planning needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
