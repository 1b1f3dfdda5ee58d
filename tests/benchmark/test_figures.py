"""`bench.figures`: what is drawn from stored results, and what every factor is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.figures import bigger_batches, draw, main

SPEEDS = {
    "vanilla": 100.0,
    "recursive-3": 110.0,
    "recursive-3-depthwise": 90.0,
    "mor-3-lockstep": 121.0,
    "mor-3": 150.0,
}


def line(arm: str, sequences: int, context: int, speed: float) -> dict[str, Any]:
    found: dict[str, Any] = dict(arm=arm, sequences=sequences, context=context, place=str(sequences), top_p=1.0)
    found |= dict(point=f"{sequences}x{context}", tokens_per_second=speed, times_vanilla=speed / 100)
    return found | dict(recursions=1 if arm == "vanilla" else int(arm.split("-")[1]), share_of_ideal=0.8)


def decode() -> dict[str, Any]:
    lines = [line(arm, 256, 256, speed) for arm, speed in SPEEDS.items()]
    lines += [line(arm, 8, 256, 50) for arm in ("vanilla", "mor-3")] + [line("vanilla", 256, 512, 80)]
    return dict(benchmark="decode", lines=[*lines, line("mor-2", 256, 256, 130)])


def throughput() -> dict[str, Any]:
    arms = [dict(arm="vanilla-4", pool="32mean", concurrency=64), dict(arm="mor-4", pool="32mean", concurrency=80)]
    tries = [
        dict(arm="mor-4", pool=pool, concurrency=number, tokens_per_second=speed)
        for pool, number, speed in (("32mean", 64, 50.0), ("32mean", 80, 60.0), ("32seq", 64, 1.0))
    ]
    wait = dict(first_token_p50=0.1, first_token_p99=0.4, gap_p50=0.01, gap_p99=0.02)
    latencies = [dict(arm="mor-3", requests_per_second=rate, **wait) for rate in (1, 2)]
    return dict(benchmark="throughput", arms=arms, tries=tries, latencies=latencies)


def test_every_factor_is_a_ratio_of_two_arms() -> None:
    figures = draw([decode(), throughput()], sequences=256, context=256, ablated="256x256")
    ablation = figures["ablation"]
    chain = dict(one_block=110 / 100, reads=121 / 110, bubbles=150 / 121, all=150 / 100)
    for factor in [*chain.values(), 150 / 90, 110 / 90, 60 / 50]:
        assert f">×{factor:.2f}<" in ablation
    assert "bigger batches (mor-4, 32mean)" in ablation and "32seq" not in ablation
    assert {*figures} == {"by_sequences", "by_context", "by_recursions", "ablation", "first_token", "between_pieces"}
    assert figures["by_recursions"].count("<circle") == 2 * 3
    assert ">MoR-3 / vanilla<" in ablation


def test_without_points_there_is_no_figure() -> None:
    assert {*draw([throughput()], sequences=1, context=1, ablated="1x1")} == {"first_token", "between_pieces"}
    assert bigger_batches([], throughput()["arms"]) == []


def test_files_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("a word\n" + json.dumps(decode()) + "\n")
    (tmp_path / "suite.json").write_text("[]")
    words = ["figures", str(tmp_path / "a.json"), str(tmp_path / "suite.json"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert (tmp_path / "ablation.svg").read_text().startswith("<svg")
