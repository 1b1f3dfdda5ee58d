"""A study from the first run to the last figure, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.cli import main
from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from mor.study import runner
from mor.study.grid import Study, only
from mor.study.places import Places
from mor.study.provenance import commit, data_fingerprint
from mor.study.runner import is_done, run_studies
from mor.study.studies import study

TEXTS = [f"document {n} tells of {n * 7} foxes and {n * 3} lazy dogs, one after the other." for n in range(400)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("study") / "shards"
    write_shards(TEXTS, byte_tokenizer(), place, validation_fraction=0.2)
    return str(place)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("held-out") / "shards"
    write_shards([text.replace("fox", "hen") for text in TEXTS[:200]], byte_tokenizer(), place, validation_fraction=0)
    return str(place)


@pytest.fixture(scope="module")
def small() -> Study:
    return only(study("smoke", 257), seeds=[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str, held_out: str, small: Study) -> Places:
    places = Places(out=tmp_path_factory.mktemp("finished"), data=shards, held_out=held_out)
    outcome = run_studies([small], places, tell=quiet)
    assert (outcome.ran, outcome.skipped, outcome.interrupted) == (2, 0, False)
    return places


def quiet(_: str) -> None:
    """Tells nobody."""


def result(places: Places, study: Study, arm: str) -> dict[str, Any]:
    run = next(run for run in study.runs if run.arm == arm)
    found: dict[str, Any] = json.loads(places.result(run).read_text())
    return found


def test_results_hold_quality_cost_and_origin(finished: Places, small: Study) -> None:
    found = result(finished, small, "mor-3")
    assert [e["requested"] for e in found["dial"]] == [1, 1.05, 2, 2.95, 3]
    assert found["own"]["requested"] is None
    assert found["own"]["gap"]["nll"] != 0
    assert found["fixed"]["decision"] == "causal"
    assert [point["recursions"] for point in found["scaling"]] == [1, 2, 3]
    assert found["probe"]["causal"] and found["probe"]["num_suffixes"] == 32
    assert found["training"]["tokens"] == 12 * 4 * 64
    assert found["training"]["peak_memory_gib"] > 0
    assert [tokens for tokens, _ in found["curve"]][-1] == 12 * 4 * 64
    origin = found["provenance"]
    assert origin["data"] == data_fingerprint(finished.data)
    assert origin["held_out"] == data_fingerprint(str(finished.held_out)) != origin["data"]
    assert origin["commit"] == commit(Path(runner.__file__).parents[1])
    assert origin["machine"]["PyTorch"] == torch.__version__
    vanilla = result(finished, small, "vanilla")
    assert vanilla["own"]["gap"] is None
    assert (vanilla["dial"], vanilla["fixed"], vanilla["scaling"]) == ([], None, [])
    assert vanilla["parameters"]["non_embedding"] > found["parameters"]["non_embedding"]


def test_commits_are_of_the_package_and_changes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOR_COMMIT", raising=False)

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit(package) is None
    monkeypatch.setenv("MOR_COMMIT", "a copy of abc")
    assert commit(package) == "a copy of abc"
    monkeypatch.delenv("MOR_COMMIT")
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


def test_what_is_done_is_skipped(finished: Places, small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("nothing is left to train"))
    outcome = run_studies([small, small], finished, tell=quiet)
    assert (outcome.ran, outcome.skipped) == (0, 2)


def test_other_data_are_refused(finished: Places, small: Study, tmp_path: Path) -> None:
    write_shards(TEXTS[:300], byte_tokenizer(), tmp_path / "other", validation_fraction=0.2)
    with pytest.raises(ValueError, match="result on other training data"):
        run_studies([small], dataclasses.replace(finished, data=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="result on other held-out data"):
        run_studies([small], dataclasses.replace(finished, held_out=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="is for 500 tokens"):
        run_studies([study("smoke", 500)], dataclasses.replace(finished, out=tmp_path))


def test_results_that_cannot_be_compared_are_refused(
    finished: Places, small: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "VERSION", runner.VERSION + 1)
    with pytest.raises(ValueError, match=f"is a result of version {runner.VERSION - 1}, .* choose another --out"):
        run_studies([small], finished)


def test_other_options_are_another_run(finished: Places, small: Study) -> None:
    first = small.runs[0]
    longer = dataclasses.replace(first.options.training, steps=13)
    changed = dataclasses.replace(first, options=dataclasses.replace(first.options, training=longer))
    assert is_done(first, finished)
    assert not is_done(changed, finished)


def test_an_interrupted_run_goes_on(
    finished: Places, small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training and before the result: weights are not trained again, the result is the same."""
    one, places = dataclasses.replace(small, runs=small.runs[:1]), dataclasses.replace(finished, out=tmp_path)
    measure = runner.measure_run

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_studies([one], places, tell=quiet)
    assert not is_done(one.runs[0], places)
    monkeypatch.setattr(runner, "measure_run", measure)
    assert run_studies([one], places, tell=quiet).ran == 1
    again, before = result(places, one, "vanilla"), result(finished, one, "vanilla")
    assert again["own"] == before["own"]
    assert again["curve"] == before["curve"]


def test_the_command(finished: Places, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["study"]) == 0
    assert "smoke" in capsys.readouterr().out
    assert main(["study", "all", "smoke", "--plan"]) == 0
    assert " cells, " in capsys.readouterr().out
    words = ["study", "smoke", "--out", str(finished.out), "--seeds", "0"]
    assert main([*words, "--data", finished.data, "--held-out", str(finished.held_out)]) == 0
    assert "0 runs done now, 2 before" in capsys.readouterr().out
    report = finished.out / "report" / "tables.md"
    table = report.read_text()
    report.unlink()
    assert main(["results", str(finished.out), "--out", str(report.parent)]) == 0
    assert report.read_text() == table
    assert main(["study", "smoke", "--out", str(tmp_path)]) == 2
    assert "give --data" in capsys.readouterr().err
