"""Streams of the hub lose and repeat nothing when the connection fails, and say what is wrong when it stays away."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mor.data.build import build_shards
from mor.data.hub import ATTEMPTS, HubSource
from mor.data.sources import open_source
from mor.data.tokenizer import byte_tokenizer

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NUM_FILES, NUM_ROWS = 3, 120
TEXTS = [f"file {f} row {r}" for f in range(NUM_FILES) for r in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three parquet files with several row groups each."""
    root = tmp_path_factory.mktemp("data") / "set"
    root.mkdir()
    for number in range(NUM_FILES):
        texts = TEXTS[number * NUM_ROWS : (number + 1) * NUM_ROWS]
        table = pyarrow.table({"id": list(range(NUM_ROWS)), "text": texts})
        parquet.write_table(table, root / f"part-{number}.parquet", row_group_size=50)
    return root


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Flaky:
    """An iterable data set whose connection is lost after the numbers of rows in `losses`, once for each."""

    def __init__(self, rows: Any, losses: list[int], error: Exception) -> None:
        self.rows, self.losses, self.error = rows, losses, error
        self.info = rows.info

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iterator = iter(self.rows)
        given = 0
        while True:
            if self.losses and given == self.losses[0]:
                self.losses.pop(0)
                raise self.error
            try:
                yield next(iterator)
            except StopIteration:
                return
            given += 1

    def state_dict(self) -> Any:
        return self.rows.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.rows.load_state_dict(state)


class FlakySource(HubSource):
    """A local data set read through a bad connection; `waits` are the pauses that were made."""

    def __init__(self, folder: Path, losses: list[int], error: Exception | None = None) -> None:
        self.waits: list[float] = []
        super().__init__(f"hf://{folder}", sleep=self.waits.append)
        self.losses = losses
        self.error = error or ConnectionError("connection lost")

    def load(self, commit: str | None) -> Any:
        return Flaky(super().load(commit), self.losses, self.error)


def test_addresses():
    source = HubSource("hf://HuggingFaceTB/smollm-corpus:fineweb-edu-dedup?split=train&column=text")
    assert (source.name, source.config) == ("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup")
    assert (source.split, source.column, source.revision) == ("train", "text", None)
    plain = HubSource("hf://a/b?revision=main", column="content")
    assert plain.describe() == {
        "kind": "hub",
        "name": "a/b",
        "config": None,
        "split": "train",
        "column": "content",
        "revision": "main",
    }
    for wrong in ("hf://", "hf://a/b:"):
        with pytest.raises(ValueError, match="expected hf://NAME"):
            HubSource(wrong)
    with pytest.raises(ValueError, match="bad option 'colum=x'"):
        HubSource("hf://a/b?colum=x")


def test_a_local_data_set_is_streamed(folder: Path):
    source = open_source(f"hf://{folder}?split=train&column=text")
    assert isinstance(source, HubSource)
    assert list(source.documents()) == TEXTS
    description = source.describe()
    assert (description["kind"], description["files"]) == ("local data set", 3)
    assert str(folder.parent) not in json.dumps(description)


def test_json_lines_are_streamed(tmp_path: Path):
    (tmp_path / "set").mkdir()
    lines = "".join(json.dumps({"body": text, "n": i}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "set" / "a.jsonl").write_text(lines)
    assert list(open_source(f"hf://{tmp_path}/set?column=body").documents()) == TEXTS


def test_every_document_can_be_the_last_before_a_pause(folder: Path):
    source = HubSource(f"hf://{folder}")
    stream = source.documents()
    for given in range(len(TEXTS)):
        if given % 37 == 0:
            position = json.loads(json.dumps(stream.position()))
            assert list(source.documents(position)) == TEXTS[given:]
        next(stream)


@pytest.mark.parametrize("losses", [[0], [1], [60, 0, 0, 100], [119, 1, 1, 1], [250, 30]])
def test_a_lost_connection_loses_nothing(losses: list[int], folder: Path):
    source = FlakySource(folder, list(losses))
    with pytest.warns(UserWarning, match="no connection at document"):
        assert list(source.documents()) == TEXTS
    assert source.losses == []
    assert len(source.waits) == len(losses)


def test_waits_grow_and_start_anew_after_success(folder: Path):
    source = FlakySource(folder, [0, 0, 0, 5, 0], TimeoutError("slow"))
    with pytest.warns(UserWarning, match="next try in"):
        assert list(source.documents()) == TEXTS
    assert source.waits == [1, 2, 4, 1, 2]


def test_a_connection_that_stays_away_is_an_error(folder: Path):
    source = FlakySource(folder, [7, *[0] * ATTEMPTS])
    stream = source.documents()
    with (
        pytest.warns(UserWarning, match="no connection at document 7"),
        pytest.raises(ConnectionError, match=r"hf://.*set: the hub could not be reached in 8 attempts"),
    ):
        list(stream)
    assert source.waits == [1, 2, 4, 8, 16, 32, 60]
    source.losses.clear()
    assert list(source.documents(stream.position())) == TEXTS[7:]


def test_other_errors_are_not_tried_again(folder: Path):
    source = FlakySource(folder, [7], RuntimeError("what is this"))
    with pytest.raises(ValueError, match=r"hf://.*set, after document 7: what is this"):
        list(source.documents())
    assert source.waits == []


@pytest.mark.parametrize(("status", "again"), [(503, True), (429, True), (404, False), (401, False)])
def test_a_busy_server_is_asked_again(status: int, again: bool):
    from types import SimpleNamespace

    from huggingface_hub.errors import HfHubHTTPError

    from mor.data.hub import is_connection_error

    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    assert is_connection_error(error) is again


def test_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    source = HubSource("hf://someone/corpus", sleep=waits.append)
    with pytest.raises(ConnectionError, match=r"hf://someone/corpus: HF_HUB_OFFLINE forbids to reach the hub"):
        next(source.documents())
    assert waits == []


def test_one_build_reads_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str | None] = []

    class Hub(HubSource):
        def resolve(self) -> str:
            return "commit-1" if not asked else "commit-2"

        def load(self, commit: str | None) -> Any:
            asked.append(commit)
            return super().load(None)

    stream = Hub(f"hf://{folder}").documents()
    next(stream)
    rest = list(Hub(f"hf://{folder}").documents(stream.position()))
    assert rest == TEXTS[1:]
    assert asked == ["commit-1", "commit-1"]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("?split=test", ValueError, "Bad split: test"),
        (":other", ValueError, "'other' not found"),
        ("?column=body", ValueError, "no column 'body'; the data set has 'id', 'text'"),
        ("?column=id", ValueError, r"document 0: field 'id' holds 0 \(int\); expected text"),
        ("-absent", FileNotFoundError, "no such folder"),
    ],
)
def test_what_is_not_there(query: str, error: type[Exception], message: str, folder: Path):
    with pytest.raises(error, match=rf"hf://.*{message}"):
        next(open_source(f"hf://{folder}{query}").documents())


def test_a_truncated_file_is_named(tmp_path: Path, folder: Path):
    (tmp_path / "set").mkdir()
    data = (folder / "part-0.parquet").read_bytes()
    (tmp_path / "set" / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"hf://.*set"):
        list(open_source(f"hf://{tmp_path}/set").documents())


def test_a_build_interrupted_by_the_connection_goes_on(folder: Path, tmp_path: Path):
    tokenizer = byte_tokenizer()
    options: dict[str, Any] = {"shard_tokens": 1000, "validation_fraction": 0.1}
    whole = build_shards(HubSource(f"hf://{folder}"), tokenizer, tmp_path / "whole", **options)
    with (
        pytest.warns(UserWarning, match="no connection"),
        pytest.raises(ConnectionError, match="could not be reached"),
    ):
        build_shards(FlakySource(folder, [200, *[0] * ATTEMPTS]), tokenizer, tmp_path / "shards", **options)
    assert build_shards(FlakySource(folder, []), tokenizer, tmp_path / "shards", **options) == whole
