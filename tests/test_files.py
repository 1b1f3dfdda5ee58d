import errno
import os

import pytest

from mor import files


def test_a_folder_appears_whole_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "made"
    with files.new_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.txt").write_text("a")
        assert not target.exists()
        assert partial.parent == target.parent
    assert (target / "inner" / "a.txt").read_text() == "a"
    assert os.listdir(target.parent) == ["made"]


def test_an_occupied_folder_is_refused_and_an_empty_one_taken(tmp_path):
    target = tmp_path / "made"
    target.mkdir()
    with files.new_folder(target) as partial:
        (partial / "a.txt").write_text("mine")
    for taken in (target, target / "a.txt"):
        with pytest.raises(FileExistsError, match="exists already; choose another"), files.new_folder(taken):
            pytest.fail("the block must not run")
    assert (target / "a.txt").read_text() == "mine"


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path):
    def fill():
        with files.new_folder(tmp_path / "made") as partial:
            (partial / "a.txt").write_text("ours")
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "a.txt").write_text("theirs")

    with pytest.raises(FileExistsError):
        fill()
    assert (tmp_path / "made" / "a.txt").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    def fill(text, then):
        with files.new_folder(tmp_path / "made", replace=True) as partial:
            (partial / "a.txt").write_text(text)
            if then is not None:
                raise then

    fill("old", None)
    with pytest.raises(error):
        fill("new", error())
    assert (tmp_path / "made" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["made"]
    fill("new", None)
    assert (tmp_path / "made" / "a.txt").read_text() == "new"


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    files.write_json(tmp_path / "summary.json", {"loss": 1.5})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"the disk is full: .*made could not be written"
    with pytest.raises(OSError, match=message) as caught, files.new_folder(tmp_path / "made") as partial:
        (partial / "a.txt").write_text("a")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"the disk is full: .*summary\.json could not be written"):
        files.write_json(tmp_path / "summary.json", {"loss": 2.5})
    assert os.listdir(tmp_path) == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == '{\n  "loss": 1.5\n}\n'


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "summary.json", {"loss": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / f"{files.TEMPORARY}made").mkdir()
    (tmp_path / f"{files.TEMPORARY}made" / "half").touch()
    with files.new_folder(tmp_path / "made") as partial:
        assert list(partial.iterdir()) == []
    (tmp_path / f"{files.TEMPORARY}step-1").mkdir()
    (tmp_path / f"{files.TEMPORARY}options.json").touch()
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["made"]
