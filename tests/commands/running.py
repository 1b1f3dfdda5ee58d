"""A small model for commands, and how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mor.cli import main
from mor.data.tokenizer import byte_tokenizer
from mor.model.calibrate import calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.quiet import without_progress_bars

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * 7} lazy dogs.\n\n" for i in range(200))


def make_model(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_recursions": 3, "sharing": "middle_cycle", "router": "expert_choice"}
    config = MorConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=256,
        **shape | options,
    )
    model = MorForCausalLM(config).eval()
    if options.get("router") != "none":
        calibrate(model, [torch.randint(257, (16, 64))])
    with without_progress_bars():
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """The one line of standard error of a command that must fail."""
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def works(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard output of a command that must succeed."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out
