"""`mor bench throughput`: its output, its errors, and quality against throughput of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from tests.commands.running import TEXT, make_model

QUICK = ("--requests", 3, "--prompt", 2, "--length", 4, "--length-sd", 0, "--concurrency", 2, "--rounds", 1)


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, dict[str, Any]]:
    """What is printed, and the JSON of the last line."""
    assert main(["bench", "throughput", *map(str, QUICK), *map(str, words)]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["bench", "throughput", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_arms_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    out, found = bench(capsys, "--dimensions", "tiny", "--arms", "vanilla,mor-3-shared", "--rates", "50")
    assert [line["arm"] for line in found["arms"]] == ["vanilla", "mor-3-shared"]
    assert "x vanilla" in out
    assert "thresholds at quantiles" in found["routing"]["mor-3-shared"]
    assert len(found["latencies"]) == 2
    assert found["options"]["length"] == 4


def test_a_trained_model_over_its_budgets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, text, figure = make_model(tmp_path / "m"), tmp_path / "t.txt", tmp_path / "f.svg"
    text.write_text(TEXT)
    words = ("--model", model, "--data", text, "--max-tokens", 512, "--mean-depth", "1,2,3", "--figure", figure)
    out, found = bench(capsys, *words)
    assert "bits/byte" in out
    assert [point["depth_on_text"] for point in found["quality"]] == pytest.approx([1, 2, 3], abs=0.3)
    assert all(point["bits_per_byte"] > 0 and point["tokens_per_second"] > 0 for point in found["quality"])
    assert figure.read_text().count("<circle") == 3


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a number nor best" in refused(capsys, "--concurrency", "most")
    assert "need --model" in refused(capsys, "--figure", "f.svg")
    assert "--model needs --data" in refused(capsys, "--model", "m")
    assert "which needs --model" in refused(capsys, "--mean-depth", "1,2")
    assert "arm 'x' is unknown" in refused(capsys, "--dimensions", "tiny", "--arms", "x")
