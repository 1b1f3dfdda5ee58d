import json

import pytest

from mor.train.journal import Journal, read_journal


def test_rewind_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.write({"step": step, "loss": 1 / 3})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3]
    before = path.read_text().splitlines()[:2]
    journal.rewind(2)
    assert path.read_text().splitlines() == before
    journal.write({"step": 3})
    journal.sync()
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_rewind_and_sync_without_a_file_do_nothing(tmp_path):
    Journal(tmp_path / "metrics.jsonl").rewind(0)
    Journal(tmp_path / "metrics.jsonl").sync()
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Journal(tmp_path / "metrics.jsonl").write({"step": 1, "loss": float("nan")})


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\nrubbish\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_journal(path)


def test_a_full_disk_leaves_no_half_line(tmp_path, small_disk):
    path = tmp_path / "metrics.jsonl"
    Journal(path).write({"step": 1})
    small_disk(path.stat().st_size + 5)
    with pytest.raises(OSError, match=r"metrics\.jsonl could not take the line of this step"):
        Journal(path).write({"step": 2, "loss": 1.5})
    assert path.read_text() == '{"step": 1}\n'
