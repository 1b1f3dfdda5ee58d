"""Reading the golden files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """One run of the authors' code. `name`: its files without their endings."""

    name: str

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(FOLDER / f"{self.name}.safetensors")

    @property
    def options(self) -> dict[str, Any]:
        """The authors' configuration."""
        return self.info["cfg"]

    @property
    def dimensions(self) -> dict[str, Any]:
        """The base model's, as in a Llama configuration."""
        return self.info["llama_config"]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The state dict, each shared tensor once."""
        return self.outputs("param")

    @property
    def aliased_parameters(self) -> dict[str, Tensor]:
        """The state dict with every name that the authors' model gives to a shared tensor."""
        weights = self.parameters
        aliases = {alias: weights[name] for name, others in self.info["tied"].items() for alias in others}
        return weights | aliases

    def outputs(self, phase: str) -> dict[str, Tensor]:
        """Tensors under `phase` (param, train or eval)."""
        return {k.removeprefix(f"{phase}/"): t for k, t in self.tensors.items() if k.startswith(f"{phase}/")}


def golden_names() -> list[str]:
    """All cases that are here."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def initialization_cases() -> list[dict[str, Any]]:
    """Source layers and share groups of the authors' five initialisations."""
    return json.loads((FOLDER / "init_strategies.json").read_text())["cases"]
