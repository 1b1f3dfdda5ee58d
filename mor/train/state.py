"""Everything that changes while a run goes on, as it is written to and read from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mor.config import to_dict
from mor.data.loader import PackedLoader
from mor.model.lm_loss import LmLoss
from mor.model.modeling_mor import MorForCausalLM
from mor.train import random_state
from mor.train.checkpoint import Checkpoint
from mor.train.optim import load_optimizer_tensors, optimizer_tensors
from mor.train.options import RunOptions
from mor.train.window import Window


@dataclass(kw_only=True)
class TrainingState:
    """A run between two steps.

    `lm_loss`: how the loss is computed, None: by the model. `step`, `tokens`: finished steps and the tokens they read.
    `seconds`: time spent training, earlier processes included. `positions`: the data position before each step of the
    window. `last_training`, `last_evaluation`: the newest lines of metrics.jsonl.
    """

    options: RunOptions
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    model: MorForCausalLM
    optimizer: torch.optim.Optimizer
    loader: PackedLoader
    window: Window
    lm_loss: LmLoss | None = None
    step: int = 0
    tokens: int = 0
    epoch: int = 0
    seconds: float = 0.0
    positions: list[dict[str, Any]] = field(default_factory=list)
    last_training: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None

    COUNTERS = ("tokens", "epoch", "seconds", "positions", "last_training", "last_evaluation")

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON, beside the step."""
        return {
            "options": to_dict(self.options),
            "data_position": self.loader.state_dict(),
            "random": random_state.capture()[1],
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors, beside the model."""
        parts = {
            "optimizer": optimizer_tensors(self.optimizer),
            "random": random_state.capture()[0],
            "window": self.window.state_dict(),
        }
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was taken; the model's weights were loaded from it already.

        Raises ValueError when its data is not this run's.
        """
        values = checkpoint.values
        self.loader.load_state_dict(values["data_position"])
        load_optimizer_tensors(self.optimizer, _part(checkpoint.tensors, "optimizer"))
        self.window.load_state_dict(_part(checkpoint.tensors, "window"), self.device)
        self.step = checkpoint.step
        for name in self.COUNTERS:
            setattr(self, name, values["counters"][name])
        random_state.restore(_part(checkpoint.tensors, "random"), values["random"])


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
