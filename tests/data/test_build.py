"""Builds give the same shards with any number of workers and however often they are interrupted."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data.build import ShardProgress, build_shards
from mor.data.build_folder import STATE_FILE
from mor.data.manifest import Manifest
from mor.data.shard_writer import ShardWriter
from mor.data.shards import TokenShards
from mor.data.stream import CountedStream, DocumentStream, Position
from mor.data.tokenizer import byte_tokenizer, train_bpe

TEXTS = [f"document {i} " + "some wörds that repeat " * (i * 37 % 401) for i in range(300)]  # about 1.4 MB


class Interrupted(Exception):
    """Stands for whatever stops a build from outside."""


class Numbered:
    """`TEXTS` as a source that can be entered anywhere, that fails before document `stop`, and counts what it gave."""

    def __init__(self, stop: int | None = None, texts: list[str] = TEXTS) -> None:
        self.stop = stop
        self.texts = texts
        self.first: int | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbered", "documents": len(self.texts)}

    def documents(self, position: Position | None = None) -> DocumentStream:
        self.first = position["documents"] if position else 0
        return CountedStream(self._read(), position)

    def _read(self) -> Iterator[str]:
        for index, text in enumerate(self.texts):
            if index == self.stop:
                raise Interrupted
            yield text


def build(source: Any, folder: Path, **options: Any) -> Manifest:
    defaults: dict[str, Any] = {"shard_tokens": 200_000, "validation_fraction": 0.1, "workers": 2}
    return build_shards(source, byte_tokenizer(), folder, **defaults | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of a build that was not interrupted."""
    return build(Numbered(), tmp_path_factory.mktemp("whole") / "shards")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(workers: int, tmp_path: Path):
    tokenizer = train_bpe(TEXTS[:20], 270)
    options: dict[str, Any] = {"shard_tokens": 20_000, "validation_fraction": 0.1}
    one = build_shards(Numbered(), tokenizer, tmp_path / "one", workers=1, **options)
    many = build_shards(Numbered(), tokenizer, tmp_path / "many", workers=workers, **options)
    assert many == one
    assert len(one.splits["train"].shards) > 5


@settings(max_examples=12)
@given(stops=st.lists(st.integers(0, len(TEXTS)), min_size=1, max_size=4), fraction=st.sampled_from([0, 0.1]))
def test_interrupted_builds_end_the_same(stops: list[int], fraction: float, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("build") / "shards"
    options: dict[str, Any] = {"validation_fraction": fraction, "shard_tokens": 150_000}
    expected = build(Numbered(), folder.with_name("whole"), **options)
    for stop in stops:
        if stop < len(TEXTS):
            with pytest.raises(Interrupted):
                build(Numbered(stop), folder, **options)
            assert not folder.exists()
    assert build(Numbered(), folder, **options) == expected
    for split in expected.splits:
        TokenShards(folder, split).verify()
    assert sorted(os.listdir(folder.parent)) == ["shards", "whole"]


def test_a_build_goes_on_after_its_last_complete_shard(tmp_path: Path, whole: Manifest):
    with pytest.raises(Interrupted):
        build(Numbered(250), tmp_path / "shards")
    reports: list[ShardProgress] = []
    source = Numbered()
    assert build(source, tmp_path / "shards", progress=reports.append) == whole
    assert source.first is not None
    assert source.first > 50
    assert reports[0].documents > 50


def test_a_build_of_something_else_starts_anew(tmp_path: Path, whole: Manifest):
    with pytest.raises(Interrupted):
        build(Numbered(250), tmp_path / "shards", shard_tokens=150_000)
    source = Numbered()
    assert build(source, tmp_path / "shards") == whole
    assert source.first == 0


def test_a_damaged_remainder_starts_anew(tmp_path: Path, whole: Manifest):
    with pytest.raises(Interrupted):
        build(Numbered(250), tmp_path / "shards")
    os.truncate(tmp_path / ".partial-shards" / "train-00000.bin", 10)
    with pytest.warns(UserWarning, match=r"starting anew: .*train-00000\.bin has 10 bytes instead of"):
        assert build(Numbered(), tmp_path / "shards") == whole


def test_a_full_disk_keeps_what_is_complete(tmp_path: Path, whole: Manifest, monkeypatch: pytest.MonkeyPatch):
    def full(self: ShardWriter, ids: Any) -> None:
        if self._name == "train-00002":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, ids)

    add = ShardWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(
            OSError, match=r"the disk is full: .*shards could not be written; what is complete was kept"
        ):
            build(Numbered(), tmp_path / "shards")
    assert os.listdir(tmp_path) == [".partial-shards"]
    source = Numbered()
    assert build(source, tmp_path / "shards") == whole
    assert source.first
    assert os.listdir(tmp_path) == ["shards"]


def test_documents_of_unknown_origin_are_never_gone_on_with(tmp_path: Path):
    class Unknown(Numbered):
        def describe(self) -> Any:
            return None

    with pytest.raises(Interrupted):
        build(Unknown(250), tmp_path / "shards")
    assert os.listdir(tmp_path) == []


SCRIPT = """
import sys, time
from tests.data.test_build import Numbered, build
def slow(done):
    print(done.documents, flush=True)
    time.sleep(0.02)
build(Numbered(), sys.argv[1], progress=slow)
"""


def start_process(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)


def test_a_killed_build_goes_on(tmp_path: Path, whole: Manifest):
    process = start_process(tmp_path / "shards")
    assert process.stdout is not None
    while not (tmp_path / ".partial-shards" / STATE_FILE).exists():
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "shards").exists()
    source = Numbered()
    assert build(source, tmp_path / "shards") == whole
    assert source.first


def test_a_second_builder_waits_and_uses_the_result(tmp_path: Path, whole: Manifest):
    process = start_process(tmp_path / "shards")
    assert process.stdout is not None
    assert process.stdout.readline()
    source = Numbered()
    with pytest.warns(UserWarning, match="another process is at work in .*waiting for it"):
        assert build(source, tmp_path / "shards") == whole
    assert source.first is None
    process.communicate()
    assert process.returncode == 0


def test_waiting_and_working_threads_share_one_folder(tmp_path: Path, whole: Manifest):
    found: list[Manifest] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [
            threading.Thread(target=lambda: found.append(build(Numbered(), tmp_path / "shards"))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [whole] * 3
    assert os.listdir(tmp_path) == ["shards"]


def test_what_is_kept_is_small(tmp_path: Path):
    with pytest.raises(Interrupted):
        build(Numbered(250), tmp_path / "shards")
    state = json.loads((tmp_path / ".partial-shards" / STATE_FILE).read_text())
    assert len(json.dumps(state["checkpoint"])) < 4000


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_is_left_as_it_was(before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    build(Numbered(texts=["a", "b"]), tmp_path / "shards")
    assert os.environ.get(name) == before


def test_workers_out_of_range(tmp_path: Path):
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        build(Numbered(), tmp_path / "shards", workers=0)


def test_progress_tells_the_share_of_the_source(tmp_path: Path):
    from mor.data.sources import FileSource

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    reports: list[ShardProgress] = []
    build(FileSource(tmp_path / "a.jsonl"), tmp_path / "shards", progress=reports.append)
    shares = [report.share or 0.0 for report in reports]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] == 1


def test_a_fast_source_is_not_read_ahead(tmp_path: Path):
    """Memory holds some batches, not all the documents that the source could give meanwhile."""
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for i in range(200):
            read += 1
            yield f"{i} " + "x" * 300_000

    ahead: list[int] = []

    def look(done: ShardProgress) -> None:
        time.sleep(0.001)
        ahead.append(read - done.documents)

    class Fast(Numbered):
        def documents(self, position: Position | None = None) -> DocumentStream:
            return CountedStream(documents())

    tracemalloc.start()
    build(Fast(), tmp_path / "shards", progress=look, shard_tokens=10**8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(ahead) <= 5
    assert peak < 16e6
