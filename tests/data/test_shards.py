"""Token shards hold every document, are made whole or not at all, and say when they are damaged."""

import errno
import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mor.data.manifest import read_manifest
from mor.data.shard_writer import ShardWriter
from mor.data.shards import ShardProgress, TokenShards, write_shards
from mor.data.tokenizer import byte_tokenizer, fingerprint, save_tokenizer, train_bpe
from tests.data.conftest import MakeShards

DOCUMENTS = [f"document {i} " + "wörd " * (i % 7) for i in range(60)]
SOURCE = {"kind": "test", "files": 3}


def text_of(shards: TokenShards, index: int) -> str:
    ids = shards.document(index)
    assert ids[-1] == shards.eos_token_id
    return bytes(ids[:-1].astype(np.uint8)).decode()


def test_documents_come_back_in_order_over_many_shards(make_shards: MakeShards):
    shards = make_shards(DOCUMENTS, shard_tokens=100)
    assert len(shards.manifest.splits["train"].shards) > 5
    assert [text_of(shards, i) for i in range(len(shards))] == DOCUMENTS
    assert list(shards.document(3, 2, 5)) == list(DOCUMENTS[3].encode()[2:5])
    with pytest.raises(IndexError):
        shards.document(len(DOCUMENTS))


def test_counts_and_hashes(make_shards: MakeShards):
    shards = make_shards(DOCUMENTS, shard_tokens=500)
    num_bytes = sum(len(d.encode()) for d in DOCUMENTS)
    assert (shards.num_documents, shards.num_tokens) == (60, num_bytes + 60)
    assert shards.bytes_per_token == num_bytes / (num_bytes + 60)
    entry = shards.manifest.splits["train"].shards[0]
    data = (shards.folder / "train-00000.bin").read_bytes()
    assert entry.tokens_sha256 == hashlib.sha256(data).hexdigest()
    assert np.frombuffer(data, "<u2").tolist()[: len(DOCUMENTS[0]) + 1] == [*DOCUMENTS[0].encode(), 256]
    assert shards.manifest == read_manifest(shards.folder)
    shards.verify()


def test_read_crosses_documents_and_shards(make_shards: MakeShards):
    shards = make_shards(DOCUMENTS, shard_tokens=100)
    everything = [token for i in range(len(shards)) for token in shards.document(i).tolist()]
    assert shards.read(0, shards.num_tokens).tolist() == everything
    assert shards.read(90, 350).tolist() == everything[90:350]


def test_both_splits_are_made_and_apart(make_shards: MakeShards):
    train = make_shards(DOCUMENTS, validation_fraction=0.2)
    validation = TokenShards(train.folder, "validation")
    texts = [{text_of(shards, i) for i in range(len(shards))} for shards in (train, validation)]
    assert texts[0] | texts[1] == set(DOCUMENTS)
    assert not texts[0] & texts[1]
    assert train.fingerprint != validation.fingerprint


def test_a_split_that_was_not_made_is_an_error(make_shards: MakeShards):
    folder = make_shards(DOCUMENTS).folder
    with pytest.raises(ValueError, match="has no split 'validation'; it was made with 'train'"):
        TokenShards(folder, "validation")


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    backend = Tokenizer(models.WordLevel({"low": 3, "high": 2**16, "</s>": 7}, unk_token="low"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    manifest = write_shards(["high", "low"], tokenizer, tmp_path / "shards", validation_fraction=0)
    shards = TokenShards(tmp_path / "shards", "train")
    assert (manifest.dtype, manifest.vocabulary_size) == ("uint32", 2**16 + 1)
    assert shards.read(0, 4).tolist() == [2**16, 7, 3, 7]
    assert fingerprint(shards.tokenizer()) == fingerprint(tokenizer)


def test_the_tokenizer_travels_along(make_shards: MakeShards):
    shards = make_shards(DOCUMENTS)
    assert fingerprint(shards.tokenizer()) == shards.manifest.tokenizer_fingerprint
    for file in (shards.folder / "tokenizer").iterdir():
        file.unlink()
    (shards.folder / "tokenizer").rmdir()
    save_tokenizer(train_bpe(DOCUMENTS, 260), shards.folder / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer that made these shards"):
        shards.tokenizer()


def test_a_vocabulary_too_small_is_an_error(make_shards: MakeShards):
    shards = make_shards(DOCUMENTS)
    shards.check_vocabulary(257)
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small for .*, whose tokenizer has 257 tokens"):
        shards.check_vocabulary(256)


def test_blank_documents_are_left_out(make_shards: MakeShards):
    assert len(make_shards(["", "a", " \n ", "b"])) == 2


@pytest.mark.parametrize("documents", [[], ["", " \n"]])
@pytest.mark.parametrize("fraction", [0, 0.1])
def test_an_empty_corpus_is_an_error(documents: list[str], fraction: float, tmp_path: Path):
    with pytest.raises(ValueError, match="the corpus is empty"):
        write_shards(documents, byte_tokenizer(), tmp_path / "shards", validation_fraction=fraction)
    assert os.listdir(tmp_path) == []


def test_one_document_cannot_be_split(tmp_path: Path):
    with pytest.raises(ValueError, match="needs two distinct documents, but the corpus has one"):
        write_shards(["only"], byte_tokenizer(), tmp_path / "shards")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"shard_tokens": 0}, {"shard_tokens": 2**40}, {"validation_fraction": 1}])
def test_options_out_of_range(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=next(iter(options))):
        write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "shards", **options)


def test_a_tokenizer_without_an_end_is_an_error(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        write_shards(DOCUMENTS, tokenizer, tmp_path / "shards")


def test_progress_is_told(tmp_path: Path):
    told: list[ShardProgress] = []
    long = ["x" * 600_000 + str(i) for i in range(4)]
    write_shards(long, byte_tokenizer(), tmp_path / "shards", validation_fraction=0, progress=told.append)
    assert [report.documents for report in told] == [1, 2, 3, 4]
    assert told[-1].tokens == told[-1].utf8_bytes + 4


def test_the_same_shards_are_used_again(tmp_path: Path):
    first = write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "shards", source=SOURCE)

    def untouched() -> Iterator[str]:
        pytest.fail("the documents must not be read")
        yield ""

    again = write_shards(untouched(), byte_tokenizer(), tmp_path / "shards", source=SOURCE)
    assert again == first
    assert os.listdir(tmp_path) == ["shards"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": {**SOURCE, "files": 4}}, r"of another source: .*'files': 3.*, not .*'files': 4"),
        ({"source": SOURCE, "validation_fraction": 0.2}, "of another validation_fraction: 0.01, not 0.2"),
        ({"source": SOURCE, "shard_tokens": 99}, "of another shard_tokens"),
        ({}, "holds token shards already; choose another folder"),
    ],
)
def test_other_shards_are_refused_and_kept(options: dict[str, Any], message: str, tmp_path: Path):
    first = write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "shards", source=SOURCE)
    with pytest.raises(FileExistsError, match=message):
        write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "shards", **options)
    with pytest.raises(FileExistsError, match=r"of another (vocabulary_size|eos_token_id|tokenizer_fingerprint)"):
        write_shards(DOCUMENTS, train_bpe(DOCUMENTS, 260), tmp_path / "shards", source=SOURCE)
    assert read_manifest(tmp_path / "shards") == first


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        write_shards(DOCUMENTS, byte_tokenizer(), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_documents_that_fail_leave_nothing(tmp_path: Path):
    def broken() -> Iterator[str]:
        yield from ["x" * 2_000_000, "y" * 2_000_000]
        raise ValueError("line 3 is bad")

    with pytest.raises(ValueError, match="line 3 is bad"):
        write_shards(broken(), byte_tokenizer(), tmp_path / "shards")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class FullDisk:
        """A file that takes a thousand bytes."""

        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by its owner)

        def write(self, data: bytes) -> int:
            if self.file.tell() + len(data) > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def close(self) -> None:
            self.file.close()

    def open_full(self: ShardWriter, folder: Path, name: str, manifest: Any) -> None:
        build(self, folder, name, manifest)
        for file in self._files:
            file.close()
        self._files = tuple(FullDisk(Path(file.name)) for file in self._files)

    build = ShardWriter.__init__
    monkeypatch.setattr(ShardWriter, "__init__", open_full)
    with pytest.raises(OSError, match=r"the disk is full: .*shards could not be written") as caught:
        write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "shards", validation_fraction=0)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    def documents(count: int) -> Iterator[str]:
        return (f"{i} " * 2000 for i in range(10_000, 10_000 + count))

    def peak(count: int) -> int:
        tracemalloc.start()
        write_shards(documents(count), byte_tokenizer(), tmp_path / f"shards-{count}", shard_tokens=10**6)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(2000) < 1.2 * peak(400)


class TestDamage:
    """Each kind of damage is found and names the file."""

    @pytest.fixture
    def folder(self, make_shards: MakeShards) -> Path:
        return make_shards(DOCUMENTS, shard_tokens=500).folder

    @pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.ends.bin"])
    def test_a_truncated_shard(self, folder: Path, name: str):
        os.truncate(folder / name, (folder / name).stat().st_size - 2)
        with pytest.raises(ValueError, match=rf"{name} is truncated: \d+ bytes where the manifest says \d+"):
            TokenShards(folder, "train")

    def test_a_shard_with_more(self, folder: Path):
        with (folder / "train-00000.bin").open("ab") as file:
            file.write(b"xx")
        with pytest.raises(ValueError, match=r"train-00000\.bin is too long"):
            TokenShards(folder, "train")

    def test_a_missing_shard(self, folder: Path):
        (folder / "train-00001.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"train-00001\.bin is missing"):
            TokenShards(folder, "train")

    @pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.ends.bin"])
    def test_a_changed_bit(self, folder: Path, name: str):
        data = bytearray((folder / name).read_bytes())
        data[0] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is damaged: sha256"):
            TokenShards(folder, "train").verify()

    def test_a_token_out_of_vocabulary(self, folder: Path):
        data = bytearray((folder / "train-00000.bin").read_bytes())
        data[1] = 200
        (folder / "train-00000.bin").write_bytes(data)
        shards = TokenShards(folder, "train")
        for use in (lambda: shards.document(0), lambda: shards.read(0, 5)):
            with pytest.raises(ValueError, match=r"train-00000\.bin is damaged: token id \d+ is outside the voc"):
                use()

    def test_a_missing_manifest(self, folder: Path):
        (folder / "manifest.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no token shards in .*: it has no manifest\.json"):
            TokenShards(folder, "train")

    @pytest.mark.parametrize("text", ["", "{", "[]", '"a"'])
    def test_a_damaged_manifest(self, folder: Path, text: str):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json (is damaged|has version None)"):
            TokenShards(folder, "train")

    def test_a_manifest_of_another_version(self, folder: Path):
        values = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**values, "version": 2, "news": 1}))
        with pytest.raises(ValueError, match=r"has version 2; only version 1 can be read"):
            TokenShards(folder, "train")

    def test_a_manifest_that_lacks_a_part(self, folder: Path):
        values = json.loads((folder / "manifest.json").read_text())
        del values["splits"]["train"]["shards"][0]["tokens"]
        (folder / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"is damaged: option 'splits\.train\.shards\[0\]\.tokens' is missing"):
            TokenShards(folder, "train")

    def test_a_damaged_folder_is_not_used_again(self, tmp_path: Path):
        write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "again", source=SOURCE)
        os.truncate(tmp_path / "again" / "train-00000.bin", 10)
        with pytest.raises(ValueError, match="is truncated"):
            write_shards(DOCUMENTS, byte_tokenizer(), tmp_path / "again", source=SOURCE)
