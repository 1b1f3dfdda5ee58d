"""`bench.suite`: what fits is run, what does not is named, and nothing outlives its limit."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.decode import _groups, _parser
from bench.suite import SUITES, Item, chosen, describe, headlines, results_of, run_suite
from mor.commands import bench


def item(name: str, command: str, seconds: float = 1.0) -> Item:
    return Item(name=name, seconds=seconds, answers="what", command=command)


def test_what_fits_is_run_and_what_does_not_is_named(tmp_path: Path) -> None:
    items = (
        item("works", "json.tool --help", 5),
        item("too-long", "antigravity", 999),
        item("fails", "no_such_module"),
    )
    done, left_out, failed = run_suite(items, tmp_path, 60)
    assert (done.status, left_out.status, failed.status) == ("done", "left out", "failed")
    assert "999 s wanted" in describe(left_out) and "exit status 1" in describe(failed)
    assert [entry["name"] for entry in json.loads((tmp_path / "suite.json").read_text())] == [i.name for i in items]
    assert "No module named" in (tmp_path / "fails.log").read_text()


def test_a_limit_ends_all_that_was_started(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        """print('{"benchmark": "x", "lines": []}', child.pid, flush=True)\n"""
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, '.')\n"]
    command[-1] += (
        "from pathlib import Path; from bench.suite import Item, run_item\n"
        f"import os; os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
        f"print(run_item(Item(name='s', seconds=1, answers='', command='sleeper'), Path({str(tmp_path)!r}), 2).status)"
    )
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "ended"
    child = (tmp_path / "s.log").read_text().split()[-1]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_results_are_the_last_line_of_the_log(tmp_path: Path) -> None:
    lines = [dict(arm="mor-3", point="1x2", tokens_per_second=5.0, times_vanilla=1.5, mean_depth=2.0)]
    lines[0] |= dict(share_of_ideal=0.9, bandwidth_share=0.8)
    found = dict(benchmark="decode", lines=lines, missing=[dict(arm="a", point="p", reason="no time left")])
    (tmp_path / "x.log").write_text("words\n" + json.dumps(found) + "\nwarning\n")
    assert results_of(item("x", ""), tmp_path) == found == json.loads((tmp_path / "x.json").read_text())
    assert [re.sub(",.*", "", line) for line in headlines(found)] == ["mor-3 1x2: 5 tokens/s", "a p: not measured"]
    (tmp_path / "y.log").write_text("nothing\n")
    assert results_of(item("y", ""), tmp_path) == {}


def test_declared_commands_are_understood() -> None:
    for suite in SUITES.values():
        assert len({entry.name for entry in suite}) == len(suite)
        for entry in suite:
            words = entry.command.format(out="o", seconds=9).split()
            if words[0] == "bench.decode":
                assert all(names and spots for names, spots in _groups(_parser().parse_args(words[1:])))
            elif words[0] == "mor":
                parser = argparse.ArgumentParser()
                bench.add_arguments(parser)
                parser.parse_args(words[2:])
            elif words[0] == "bench.serving":
                serving = pytest.importorskip("bench.serving", reason="serving needs the extra mor[serve]")
                serving._parser().parse_args(words[1:])


def test_items_are_chosen_by_name() -> None:
    assert [entry.name for entry in chosen("engine", "peers,decode")] == ["decode", "peers"]
    with pytest.raises(ValueError, match="has no x"):
        chosen("engine", "x")
