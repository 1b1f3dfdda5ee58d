"""Documents are read from every supported kind of file, whole and in order, and errors name file, line and field."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mor.data.sources import FileSource, open_source, read_documents, standard_library_documents
from mor.data.standard_library import StandardLibrary

TEXTS = ["first document", "zweites Dokument: größer\nmit Zeilen", "第三 🙂"]


def json_lines(texts: list[str], field: str = "text", **more: Any) -> str:
    return "".join(json.dumps({"id": i, field: text, **more}) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
def test_json_lines(name: str, tmp_path: Path):
    data = (json_lines(TEXTS[:1]) + "\n  \n" + json_lines(TEXTS[1:])).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(data))
    assert list(read_documents(tmp_path / name)) == TEXTS


def test_another_field(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS, field="content"))
    assert list(read_documents(tmp_path / "a.jsonl", text_field="content")) == TEXTS


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS).encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain")
    assert list(read_documents(tmp_path)) == [*TEXTS, "plain"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.zst"])
def test_a_short_text_file_is_one_document(name: str, tmp_path: Path):
    text = "Title\r\n\r\nParagraph one.\n\nParagraph twö.\n"
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(text.encode()))
    assert list(read_documents(tmp_path / name)) == [text]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: Path):
    paragraphs = [f"Paragraph {i} " + "word " * (i % 40) + "\n\n" for i in range(3000)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    documents = list(read_documents(tmp_path / "book.txt"))
    assert "".join(documents) == "".join(paragraphs)
    assert all(document.startswith("Paragraph") and document.endswith("\n\n") for document in documents)
    assert all(16384 <= len(document) < 2 * 16384 for document in documents[:-1])


@given(
    text=st.lists(st.sampled_from(["a", "bc ", "\n", "\n\n", "\r\n\r\n", "é"]), max_size=60).map("".join),
    size=st.integers(1, 12),
)
def test_cutting_loses_nothing(text: str, size: int, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    documents = list(FileSource(path, document_characters=size).documents())
    assert "".join(documents) == text
    assert all(0 < len(document) <= 2 * size + 2 for document in documents)


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(700)]
    table = pyarrow.table({"id": list(range(700)), "text": texts, "n": [None] * 700})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert list(read_documents(tmp_path / "a.parquet")) == texts
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; the file has 'id', 'text', 'n'"):
        list(read_documents(tmp_path / "a.parquet", text_field="body"))
    with pytest.raises(ValueError, match=r"a\.parquet row 0: field 'id' holds 0 \(int\); expected text"):
        list(read_documents(tmp_path / "a.parquet", text_field="id"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable parquet file"):
        list(read_documents(tmp_path / "b.parquet"))


def test_a_folder_is_read_in_order_of_names(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("in b")
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS))
    (tmp_path / "c.txt").write_text("in c")
    (tmp_path / "ignored.png").write_bytes(b"\x89")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("hidden")
    assert list(read_documents(tmp_path)) == [*TEXTS, "in b", "in c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "a"',
            r"""a\.jsonl:2: not a line of JSON \(Expecting ',' delimiter at column 13\): b'{"text": "a"'""",
        ),
        ('{"content": "a", "id": 3}', r"a\.jsonl:2: no field 'text'; the line has 'content', 'id'"),
        ("{}", r"a\.jsonl:2: no field 'text'; the line has none"),
        ('["a"]', r"a\.jsonl:2: the line holds a list; expected an object with 'text'"),
        ('{"text": null}', r"a\.jsonl:2: field 'text' holds None \(NoneType\); expected text"),
        ('{"text": "\\ud83d"}', r"a\.jsonl:2: field 'text' is not valid Unicode"),
        ('{"text": "\xff"}', r"a\.jsonl:2: not a line of JSON \('utf-8' codec can't decode"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:1]).encode() + line.encode("latin-1") + b"\n")
    documents = read_documents(tmp_path / "a.jsonl")
    assert next(documents) == TEXTS[0]
    with pytest.raises(ValueError, match=message):
        next(documents)


def test_a_surrogate_pair_is_one_character(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["🙂"]


def test_bad_paths_are_errors_at_once(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        FileSource(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a\.csv has an unsupported suffix; supported are \.txt, \.md, \.jsonl"):
        FileSource(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="holds no file to read among its 1"):
        FileSource(tmp_path)
    with pytest.raises(ValueError, match="document_characters=0"):
        FileSource(tmp_path, document_characters=0)


def test_every_place_can_be_entered_again(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS[:1]) + "\n\n" + json_lines(TEXTS[1:]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"word word\n\n" * 30))
    parquet.write_table(
        pyarrow.table({"text": [f"row {i}" for i in range(30)]}), tmp_path / "c.parquet", row_group_size=7
    )
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS).encode()))
    source = FileSource(tmp_path, document_characters=50)
    expected = list(source.documents())
    stream = source.documents()
    shares: list[float] = []
    for index in range(len(expected)):
        position = json.loads(json.dumps(stream.position()))
        assert list(source.documents(position)) == expected[index:]
        assert next(stream) == expected[index]
        shares.append(stream.share() or 0)
    assert list(source.documents(stream.position())) == []
    assert shares == sorted(shares)
    assert next(stream, None) is None
    assert stream.share() == 1


def test_the_embedded_corpus_can_be_entered_again():
    source = StandardLibrary(max_bytes=100_000)
    stream = source.documents()
    expected = list(source.documents())
    for _ in range(3):
        next(stream)
    assert list(source.documents(stream.position())) == expected[3:]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_the_place_of_the_damage_is_told(suffix: str, compress: Any, tmp_path: Path):
    rng = random.Random(0)
    lines = json_lines([f"{rng.getrandbits(4000):x}" for _ in range(500)]).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines)[: len(lines) // 3])
    documents = read_documents(path)
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+ is damaged or cut short after line [1-9]\d+: ") as caught:
        list(documents)
    assert str(tmp_path) in str(caught.value)


def test_the_row_of_the_damage_is_told(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"{i} " * 200 for i in range(2000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=500, use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = len(data) * 5 // 8
    data[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    documents = read_documents(path)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file, damaged after row [1-9][0-9]+: "):
        list(documents)


def test_options_after_a_path(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS, field="body"))
    assert list(open_source(f"{tmp_path}/a.jsonl?column=body").documents()) == TEXTS
    (tmp_path / "b?column=c.txt").write_text("what a name")
    assert list(open_source(f"{tmp_path}/b?column=c.txt").documents()) == ["what a name"]
    with pytest.raises(ValueError, match="only data sets of the library datasets have splits"):
        open_source(f"{tmp_path}/a.jsonl?split=train")


def test_damaged_files_are_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        list(read_documents(tmp_path / "a.txt"))
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(json_lines(TEXTS * 50).encode())[:-9])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            list(read_documents(path))


def test_a_description_changes_with_the_files(tmp_path: Path):
    path = tmp_path / "data" / "a.txt"
    path.parent.mkdir()
    path.write_text("abc")
    os.utime(path, ns=(10, 10))
    before = FileSource(path.parent).describe()
    assert json.loads(json.dumps(before)) == before == FileSource(path.parent).describe()
    assert str(tmp_path) not in json.dumps(before)
    os.utime(path, ns=(20, 20))
    assert FileSource(path.parent).describe() != before
    assert FileSource(path.parent, text_field="body").describe() != before


def test_open_source_knows_the_embedded_corpus(tmp_path: Path):
    source = open_source("standard-library", max_bytes=50_000)
    assert isinstance(source, StandardLibrary)
    assert list(standard_library_documents(50_000)) == list(source.documents())
    (tmp_path / "a.txt").write_text("abc")
    assert list(open_source(tmp_path / "a.txt").documents()) == ["abc"]
    with pytest.raises(ValueError, match="max_bytes=5 is only for 'standard-library'"):
        open_source(tmp_path / "a.txt", max_bytes=5)
