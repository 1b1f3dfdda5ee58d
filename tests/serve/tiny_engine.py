"""A tiny engine that is slow and breaks when asked to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from mor.data.tokenizer import byte_tokenizer
from mor.engine.engine import Engine
from mor.engine.options import EngineOptions
from mor.engine.outputs import RequestOutput
from mor.model.calibrate import calibrate
from mor.model.modeling_mor import MorForCausalLM
from mor.quiet import without_progress_bars
from tests.serve.sources import CRASH, HANG, RAISE
from tests.tiny import tiny_model

TOKENIZER = byte_tokenizer()


def make_model() -> MorForCausalLM:
    """A calibrated model of bytes with three recursions."""
    model = tiny_model(router="expert_choice", vocab_size=257, eos_token_id=256, pad_token_id=256)
    calibrate(model, [torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))])
    return model


def save_model(folder: Path) -> Path:
    """It and its tokenizer in `folder`."""
    with without_progress_bars():
        make_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(str(folder))
    return folder


def make_engine(seconds: float = 0.0, **options: Any) -> Engine:
    """An engine of that model."""
    torch.set_num_threads(1)
    model = make_model()
    settings = {"page_entries": 4, "num_pages": 2000, "max_requests": 16, **options}
    return BreakableEngine(model, TOKENIZER, EngineOptions(**settings), seconds=seconds)


class BreakableEngine(Engine):
    """An engine with the faults that a prompt asks for."""

    def __init__(self, *arguments: Any, seconds: float) -> None:
        super().__init__(*arguments)
        self._seconds, self._faults = seconds, set[str]()

    def add_request(self, request_id: str, prompt: Any, params: Any = None) -> list[str]:
        names = super().add_request(request_id, prompt, params)
        self._faults |= {prompt[0] if isinstance(prompt, str) else chr(prompt[0])} & {CRASH, RAISE, HANG}
        return names

    def step(self) -> list[RequestOutput]:
        time.sleep(self._seconds)
        if CRASH in self._faults:
            os._exit(9)
        if HANG in self._faults:
            time.sleep(60)
        if RAISE in self._faults:
            self._faults.discard(RAISE)
            self._break_next_visit()
        return super().step()

    def _break_next_visit(self) -> None:
        visit = self.runner.visit

        def broken(*_: Any) -> Any:
            self.runner.visit = visit  # type: ignore[method-assign]
            raise RuntimeError("secret detail at /some/path")

        self.runner.visit = broken  # type: ignore[method-assign]
