"""A folder that appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor.model.output_folder import copy_tokenizer, output_folder


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with output_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_stays_after_an_error(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_anything_else_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    for taken in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with pytest.raises(ValueError, match="already exists; choose another output folder"), output_folder(taken):
            pass
    assert (tmp_path / "empty" / "file").read_text() == "x"


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.safetensors"):
        (source / name).write_text(name)
    assert copy_tokenizer(source, target) == ["tokenizer.json", "merges.txt"]
    assert sorted(path.name for path in target.iterdir()) == ["merges.txt", "tokenizer.json"]
