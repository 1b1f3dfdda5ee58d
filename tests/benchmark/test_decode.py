"""`bench.decode`: points, what is built and measured once, and that the depth watched is the one wanted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.decode import Bench, say
from bench.decode_point import Spot
from mor.benchmark.arms import build_arm
from mor.engine import slot_runner

SETTINGS: dict[str, Any] = dict(mean_depth=None, max_length=128, device="cpu", dtype=torch.float32)


def bench() -> Bench:
    return Bench("tiny", SETTINGS, batches=3, rates=(1e10, 1e11))


def test_points_are_read() -> None:
    assert Spot.of("512x2048") == Spot(place="512", context=2048)
    assert [str(Spot.of(text)) for text in ("40GiBx256", "8x64:0.9")] == ["40GiBx256", "8x64:0.9"]
    for wrong in ("512", "x", "32seqx256", "fitx256"):
        with pytest.raises(ValueError, match=r"is not like 512x2048|pool"):
            Spot.of(wrong)


def test_a_pool_holds_more_sequences_that_write_less() -> None:
    spot = Spot.of("0.01GiBx64")
    rooms = [spot.room_for(build_arm(name, "tiny", max_length=128)) for name in ("vanilla", "mor-3", "recursive-3")]
    assert rooms[1][0] > rooms[0][0] and rooms[2][0] <= rooms[1][0]


def test_arms_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With batches that no clock cuts short, as on CUDA, so that what is settled is what is watched."""
    monkeypatch.setattr(slot_runner, "BATCH_SECONDS", math.inf)
    measured = bench()
    for name in ("vanilla", "mor-3", "mor-3-lockstep", "mor-3"):
        line = measured.run(name, Spot.of("4x48"))
        if line is not None:
            say(line)
    assert [line["arm"] for line in measured.lines] == ["vanilla", "mor-3", "mor-3-lockstep"]  # none twice
    assert [*measured._built] == ["vanilla", "mor-3"]
    assert measured.lines[0]["times_vanilla"] == 1
    for line in measured.lines[1:]:
        assert line["mean_depth"] == pytest.approx(2.0, rel=0.01) and line["asked_depth"] > 1
        assert line["times_vanilla"] == line["tokens_per_second"] / measured.lines[0]["tokens_per_second"]
    assert "depth 2.0" in capsys.readouterr().out


def test_what_fails_is_named_and_the_rest_goes_on() -> None:
    measured = bench()
    assert measured.run("vanilla", Spot.of("0.00001GiBx64")) is None
    assert measured.run("vanilla", Spot.of("2x32")) is not None
    assert measured.missing[0]["point"] == "0.00001GiBx64" and "Error" in measured.missing[0]["reason"]
