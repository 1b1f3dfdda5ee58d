"""Everything that changes while a run goes on, as it is written to and read from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mor.config import to_dict
from mor.data.prefetch import Loader
from mor.model.lm_loss import LmLoss
from mor.model.modeling_mor import MorForCausalLM
from mor.train import random_state
from mor.train.checkpoint import Checkpoint
from mor.train.optim import load_optimizer_tensors, optimizer_tensors
from mor.train.options import RunOptions
from mor.train.parallel import OneProcess, Parallel
from mor.train.stored_tensors import StoredTensors
from mor.train.window import Window


@dataclass(kw_only=True)
class TrainingState:
    """A run between two steps.

    `lm_loss`: how the loss is computed, None: by the model. `parallel`: how ranks share the model. `step`, `tokens`:
    finished steps and the tokens they read. `flops`: training FLOPs up to the last log line, on the first rank.
    `seconds`: time spent training, earlier processes included. `positions`: the data position before each step of the
    window. `recent`, `judged`, `spikes`: the values that the next step is compared with, the last step that was looked
    at for spikes, and how many there were. `last_training`, `last_evaluation`: the newest lines of
    metrics.jsonl.
    """

    options: RunOptions
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    model: MorForCausalLM
    optimizer: torch.optim.Optimizer
    loader: Loader
    window: Window
    lm_loss: LmLoss | None = None
    parallel: Parallel = field(default_factory=OneProcess)
    step: int = 0
    tokens: int = 0
    epoch: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    positions: list[dict[str, Any]] = field(default_factory=list)
    recent: dict[str, Sequence[float]] = field(default_factory=dict)
    judged: int = 0
    spikes: int = 0
    last_training: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None

    COUNTERS = (
        "tokens",
        "epoch",
        "flops",
        "seconds",
        "positions",
        "recent",
        "judged",
        "spikes",
        "last_training",
        "last_evaluation",
    )

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON, beside the step: the first rank's, as it is now."""
        return {
            "options": to_dict(self.options),
            "data_position": self.loader.state_dict(),
            "random": random_state.capture()[1],
            "ranks": self.parallel.ranks.size,
            "counters": {name: deepcopy(getattr(self, name)) for name in self.COUNTERS},
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors, beside the model: the first rank's, and of spread ones this rank's part.

        All ranks must call it.
        """
        ranks = self.parallel.ranks
        self.window.collect(ranks)
        parts = {
            "optimizer": optimizer_tensors(self.optimizer),
            "random": random_state.capture()[0],
            "window": self.window.state_dict(),
        }
        others = ranks.each(lambda: random_state.capture_device(self.device))[1:]
        parts |= {_random_part(rank): state for rank, state in enumerate(others, start=1)}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was taken; the model's weights were loaded from it already.

        Raises ValueError when its data is not this run's.
        """
        values, tensors = checkpoint.values, checkpoint.tensors
        self.loader.load_state_dict(values["data_position"])
        load_optimizer_tensors(self.optimizer, tensors.part("optimizer"))
        self.window.load_state_dict(dict(tensors.part("window")), self.device)
        if not self.parallel.ranks.is_first:
            self.window.clear_counts()
        self.step = checkpoint.step
        for name in self.COUNTERS:
            setattr(self, name, values["counters"][name])
        self._restore_random(tensors, values)

    def _restore_random(self, tensors: StoredTensors, values: dict[str, Any]) -> None:
        """As it was on this rank, if there are as many as then; else new ones draw new numbers."""
        ranks = self.parallel.ranks
        if ranks.is_first:
            random_state.restore(dict(tensors.part("random")), values["random"])
        elif ranks.size == values["ranks"]:
            random_state.restore_device(dict(tensors.part(_random_part(ranks.rank))), self.device)
        else:
            random_state.seed_rank(self.options.training.seed, ranks.rank, self.step)


def _random_part(rank: int) -> str:
    return f"random.{rank}"
