"""A study from the first run to the last figure, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from mor.cli import main
from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from mor.study import runner
from mor.study.grid import Study, only
from mor.study.provenance import commit, data_fingerprint
from mor.study.runner import is_done, run_study
from mor.study.studies import study

TEXTS = [f"document {n} tells of {n * 7} foxes and {n * 3} lazy dogs, one after the other." for n in range(400)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("study") / "shards"
    write_shards(TEXTS, byte_tokenizer(), place, validation_fraction=0.2)
    return str(place)


@pytest.fixture(scope="module")
def small() -> Study:
    return only(study("smoke", 257), seeds=[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str, small: Study) -> Path:
    out = tmp_path_factory.mktemp("finished")
    outcome = run_study(small, out, shards, tell=lambda _: None)
    assert (outcome.ran, outcome.skipped, outcome.interrupted) == (2, 0, False)
    return out


def test_results_hold_quality_cost_and_origin(finished: Path, shards: str) -> None:
    found = json.loads((finished / "mor-3--tiny--seed-0" / "result.json").read_text())
    assert [e["requested"] for e in found["evaluations"]] == [None, 1.5, 2.5]
    assert found["evaluations"][0]["gap"]["nll"] != 0
    assert found["training"]["tokens"] == 12 * 4 * 64
    assert [tokens for tokens, _ in found["curve"]][-1] == 12 * 4 * 64
    origin = found["provenance"]
    assert origin["data"] == data_fingerprint(shards)
    assert origin["commit"] == commit(Path(runner.__file__).parents[1])
    assert origin["machine"]["PyTorch"] == torch.__version__
    vanilla = json.loads((finished / "vanilla--tiny--seed-0" / "result.json").read_text())
    assert [e["gap"] for e in vanilla["evaluations"]] == [None]
    assert vanilla["parameters"]["non_embedding"] > found["parameters"]["non_embedding"]


def test_commits_are_of_the_package_and_changes_are_told(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert commit(package) is None, "the repository does not hold the package"
    git("add", "package")
    git("commit", "-m", "second")
    assert commit(package) == git("rev-parse", "HEAD").strip()
    (tmp_path / "elsewhere.txt").write_text("of no matter")
    assert "+" not in str(commit(package))
    (package / "__init__.py").write_text("changed = True")
    assert commit(package) == git("rev-parse", "HEAD").strip() + "+changes"


def test_what_is_done_is_skipped(finished: Path, shards: str, small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("nothing is left to train"))
    outcome = run_study(small, finished, shards, tell=lambda _: None)
    assert (outcome.ran, outcome.skipped) == (0, 2)


def test_other_options_and_other_data_are_refused(finished: Path, shards: str, small: Study, tmp_path: Path) -> None:
    first = small.runs[0]
    longer = dataclasses.replace(first.options.training, steps=13)
    changed = dataclasses.replace(first, options=dataclasses.replace(first.options, training=longer))
    with pytest.raises(ValueError, match=r"training\.steps"):
        run_study(dataclasses.replace(small, runs=(changed, *small.runs[1:])), finished, shards)
    write_shards(TEXTS[:300], byte_tokenizer(), tmp_path / "other", validation_fraction=0.2)
    with pytest.raises(ValueError, match="result on other data"):
        run_study(small, finished, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is for 500 tokens"):
        run_study(study("smoke", 500), tmp_path / "new", shards)


def test_an_interrupted_run_goes_on(
    shards: str, small: Study, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training and before the result: weights are not trained again, the result is the same."""
    one = dataclasses.replace(small, runs=small.runs[:1])
    measure = runner.measure_run

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(one, tmp_path, shards, tell=lambda _: None)
    options = runner._placed(one.runs[0], tmp_path, shards)
    assert not is_done(options)
    monkeypatch.setattr(runner, "measure_run", measure)
    assert run_study(one, tmp_path, shards, tell=lambda _: None).ran == 1
    name = f"{one.runs[0].name}/result.json"
    again, before = (json.loads((place / name).read_text()) for place in (tmp_path, finished))
    assert again["evaluations"] == before["evaluations"]
    assert again["curve"] == before["curve"]


def test_the_command(finished: Path, shards: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study"]) == 0
    assert "smoke" in capsys.readouterr().out
    assert main(["study", "smoke", "--plan"]) == 0
    assert "4 runs, " in capsys.readouterr().out
    words = ["study", "smoke", "--out", str(finished), "--seeds", "0"]
    assert main([*words, "--data", shards]) == 0
    assert "0 runs done now, 2 before" in capsys.readouterr().out
    table = (finished / "table.md").read_text()
    (finished / "table.md").unlink()
    assert main([*words, "--report"]) == 0
    assert (finished / "table.md").read_text() == table
    assert main(["study", "smoke", "--out", str(tmp_path)]) == 2
    assert "give --data" in capsys.readouterr().err
