"""Progress shows what is done and how fast, on a terminal and without one."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mor.cli import main
from mor.data import build_progress
from mor.data.build import ShardProgress
from mor.data.build_progress import BuildProgress
from mor.data.manifest import read_manifest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that pass before each look at the clock."""
    now = [100.0]
    monkeypatch.setattr(build_progress.time, "monotonic", lambda: now[0])
    return now


def report(documents: int, share: float | None = None) -> ShardProgress:
    return ShardProgress(documents=documents, tokens=documents * 1000, utf8_bytes=documents * 4000, share=share)


def test_speed_counts_this_process_alone(clock: list[float]):
    with BuildProgress(Console(file=io.StringIO())) as progress:
        progress(report(5000))
        assert progress.summary() is None
        clock[0] += 10
        progress(report(5100))
    assert progress.summary() == "10 s: 10,000 tokens/s, 0.04 MB/s of text, 10 documents/s"


def test_without_a_terminal_a_line_now_and_then(clock: list[float]):
    file = io.StringIO()
    with BuildProgress(Console(file=file, width=200)) as progress:
        for second in range(100):
            clock[0] = 100 + second
            progress(report(second, share=second / 100))
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "tokenising: 31 documents, 31 k tokens, 1 documents/s, 0.0 MB/s (31%)"


def test_a_terminal_shows_a_bar(clock: list[float]):
    file = io.StringIO()
    with BuildProgress(Console(file=file, width=200, force_terminal=True)) as progress:
        progress(report(1, share=0.25))
        clock[0] += 1
        progress(report(2_000, share=0.5))
        progress._bars.refresh()
    assert "50%" in file.getvalue()
    assert "2,000 documents, 2 M tokens, 1,999 documents/s, 8.0 MB/s" in file.getvalue()


def test_the_command_mixes_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in "ab":
        lines = (json.dumps({"body": f"{name} {i} " + "text " * 50}) + "\n" for i in range(50))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [f"{tmp_path}/a.jsonl?column=body=0.5", f"{tmp_path}/b.jsonl?column=body=0.5"]
    assert main(["data", "build", *sources, str(tmp_path / "shards"), "--workers", "2"]) == 0
    assert "documents" in capsys.readouterr().out
    source = read_manifest(tmp_path / "shards").source
    assert source is not None
    assert source["kind"] == "mixture"
    assert main(["data", "inspect", str(tmp_path / "shards"), "--speed", "--documents", "1"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(["data", "build", str(tmp_path), str(tmp_path / "none"), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "mor: workers=0 must be at least 1\n"
