"""Studies in several processes: every run once, failures told, stops that go on later."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import pytest

from mor.data.shards import write_shards
from mor.data.tokenizer import byte_tokenizer
from mor.study.grid import Budget, Recipe, Study, StudyRun, distinct, grid, only
from mor.study.places import Places
from mor.study.pool import Pool, Worker, run_in_parallel
from mor.study.progress import StudyProgress, Tally
from mor.study.runner import StudyOutcome, run_studies
from mor.study.studies import study, vanilla
from mor.study.worker import Word

TEXTS = [f"document {n} tells of {n * 7} foxes and {n * 3} lazy dogs, one after the other." for n in range(400)]

Behaviour = Callable[[StudyRun, threading.Event], Iterator[Word]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("pool") / "shards"
    write_shards(TEXTS, byte_tokenizer(), place, validation_fraction=0.2)
    return str(place)


def changed(whole: Study, **training: object) -> Study:
    """The study with other training options."""
    runs = [
        dataclasses.replace(
            run,
            options=dataclasses.replace(
                run.options,
                training=dataclasses.replace(run.options.training, **training),  # type: ignore[arg-type]
            ),
        )
        for run in whole.runs
    ]
    return dataclasses.replace(whole, runs=tuple(runs))


def results(out: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("runs/*/result.json")}


def test_two_processes_do_what_one_does(shards: str, tmp_path: Path) -> None:
    two = only(study("smoke", 257), seeds=[0])
    alone, together = (Places(out=tmp_path / name, data=shards) for name in ("alone", "together"))
    run_studies([two], alone, tell=lambda _: None)
    said: list[str] = []
    outcome = run_in_parallel([two], together, jobs=2, tell=said.append)
    assert (outcome.ran, outcome.skipped, outcome.failed, outcome.interrupted) == (2, 0, (), False), said
    before, after = results(alone.out), results(together.out)
    assert before.keys() == after.keys() == {run.key for run in two.runs}
    for key, result in before.items():
        assert result["own"]["nll"] == pytest.approx(after[key]["own"]["nll"], rel=1e-4)  # type: ignore[index]
        assert after[key]["training"]["jobs"] == 2  # type: ignore[index]
    again = run_in_parallel([two], together, jobs=2, tell=lambda _: None)
    assert (again.ran, again.skipped) == (0, 2)


@pytest.mark.slow
def test_a_failing_run_is_named_and_the_others_go_on(shards: str, tmp_path: Path) -> None:
    good = study("smoke", 257)
    bad = changed(good, device="cuda:7")
    mixed = dataclasses.replace(good, runs=(bad.runs[0], *good.runs[1:3]))
    said: list[str] = []
    outcome = run_in_parallel([mixed], Places(out=tmp_path, data=shards), jobs=1, tell=said.append)
    assert outcome.failed == ("vanilla--tiny--seed-0",)
    assert outcome.ran == 2
    assert any("vanilla--tiny--seed-0 failed: ValueError: device='cuda:7' cannot be used here" in line for line in said)
    assert any("Traceback" in line for line in said)


@pytest.mark.slow
def test_a_time_limit_stops_at_a_checkpoint_and_the_same_call_goes_on(shards: str, tmp_path: Path) -> None:
    long = changed(study("smoke", 257), steps=100_000, evaluation_interval=0, log_interval=10)
    places, said = Places(out=tmp_path, data=shards), list[str]()
    outcome = run_in_parallel([long], places, jobs=1, seconds=25, tell=said.append)
    assert outcome.interrupted and outcome.ran == 0 and not outcome.failed, said
    assert any("the time is up: 1 runs stop at a checkpoint, 3 do not start" in line for line in said)
    first = places.result(long.runs[0]).parent
    (kept,) = (first / "checkpoints").glob("step-*")
    assert int(kept.name.partition("-")[2]) > 0


@pytest.mark.slow
def test_the_command_stops_on_a_signal_and_leaves_no_process(shards: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mor", "study", "smoke", "--data", shards, "--out", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (130, 0), said  # 0: it was done before the signal came
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout == ""
    assert subprocess.run(command, capture_output=True, text=True, timeout=240).returncode == 0
    assert len(results(tmp_path)) == 4


class Puppet(threading.Thread):
    """Stands for a worker's process: says ready, and of each run what `behave` says; ends after a run that is not done,
    and without a word when `behave` raises."""

    def __init__(self, behave: Behaviour) -> None:
        super().__init__(daemon=True)
        self.ours, self._theirs = multiprocessing.Pipe()
        self._behave, self._stop_asked, self.exitcode = behave, threading.Event(), 0
        self.start()

    def run(self) -> None:
        kind = "ready"
        try:
            self._theirs.send(Word(kind=kind))
            while kind in ("ready", "done") and (run := self._theirs.recv()) is not None:
                for word in self._behave(run, self._stop_asked):
                    self._theirs.send(word)
                    kind = word.kind
                if kind == "done":
                    self._theirs.send(Word(kind="ready"))
        except MemoryError:
            self.exitcode = 9
        finally:
            self._theirs.close()

    def terminate(self) -> None:
        self._stop_asked.set()


def pool(study: Study, behave: Behaviour, *, jobs: int, seconds: float | None = None) -> tuple[StudyOutcome, list[str]]:
    """The outcome of a pool of puppets, and what it told."""

    def start(number: int) -> Worker:
        puppet = Puppet(behave)
        return Worker(process=cast(BaseProcess, puppet), pipe=puppet.ours)

    said: list[str] = []
    found = Pool(study.runs, start, outcome=StudyOutcome(), jobs=jobs, tell=said.append)
    return found.run(seconds), said


def done(run: StudyRun, _: threading.Event) -> Iterator[Word]:
    yield Word(kind="at", tokens=run.tokens // 2)
    yield Word(kind="measuring", tokens=run.tokens)
    yield Word(kind="done", tokens=run.tokens)


def test_every_run_is_claimed_once() -> None:
    claimed: list[str] = []

    def behave(run: StudyRun, stop: threading.Event) -> Iterator[Word]:
        claimed.append(run.name)
        yield from done(run, stop)

    outcome, _ = pool(study("smoke", 257), behave, jobs=3)
    assert (outcome.ran, outcome.interrupted) == (4, False)
    assert sorted(claimed) == sorted(run.name for run in study("smoke", 257).runs)


@pytest.mark.parametrize(("jobs", "order"), [(1, "ABCAB"), (2, "ABCAB"), (3, "AABBC")])
def test_a_worker_goes_on_with_what_it_has_compiled_if_that_is_near(jobs: int, order: str) -> None:
    recipe = dataclasses.replace(Recipe(), device="cpu")
    arms = {"A": vanilla(64, 64), "B": vanilla(96, 64), "C": vanilla(128, 64)}
    named = {
        arm: grid({arm: model}, seeds=(0, 1), budgets=[Budget(name="a", steps=3)], recipe=recipe)
        for arm, model in arms.items()
    }
    runs = [named[arm][seed] for arm, seed in (("A", 0), ("B", 0), ("C", 0), ("A", 1), ("B", 1))]
    found = Pool(runs, lambda _: pytest.fail("none"), outcome=StudyOutcome(), jobs=jobs, tell=lambda _: None)
    last, taken = None, list[str]()
    while found._waiting:
        last = found._next(last)
        taken.append(last.arm)
    assert "".join(taken) == order


@pytest.mark.parametrize(("is_killed", "error"), [(False, "ValueError: no"), (True, "exit code 9")])
def test_a_run_that_fails_or_is_killed_is_named_and_the_others_go_on(is_killed: bool, error: str) -> None:
    def behave(run: StudyRun, stop: threading.Event) -> Iterator[Word]:
        if run.name == "vanilla--tiny--seed-0":
            if is_killed:
                raise MemoryError
            yield Word(kind="failed", error="ValueError: no", trace="Traceback")
        else:
            yield from done(run, stop)

    outcome, said = pool(study("smoke", 257), behave, jobs=1)
    assert (outcome.ran, outcome.failed) == (3, ("vanilla--tiny--seed-0",))
    assert any(line.startswith("vanilla--tiny--seed-0 failed: ") and error in line for line in said)


def test_when_the_time_is_up_what_trains_stops_and_what_is_measured_ends() -> None:
    def behave(run: StudyRun, stop: threading.Event) -> Iterator[Word]:
        if run.arm == "vanilla":
            yield Word(kind="at", tokens=1)
            stop.wait(10)
            yield Word(kind="stopped", tokens=2)
        else:
            yield Word(kind="measuring", tokens=run.tokens)
            time.sleep(1.5)
            yield Word(kind="done", tokens=run.tokens)

    outcome, said = pool(study("smoke", 257), behave, jobs=2, seconds=0.6)
    assert (outcome.ran, outcome.interrupted, outcome.failed) == (1, True, ())
    assert any("the time is up: 1 runs stop at a checkpoint, 2 do not start" in line for line in said)


def test_two_at_one_folder_are_refused(tmp_path: Path, shards: str) -> None:
    places = Places(out=tmp_path, data=shards)
    with places.claimed(), pytest.raises(ValueError, match="is in use by another `mor study`"):
        run_studies([study("smoke", 257)], places)
    with places.claimed():
        pass


def test_no_jobs_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        run_in_parallel([study("smoke", 257)], Places(out=tmp_path, data=shards), jobs=0)


def test_runs_are_distinct_and_headlines_come_first() -> None:
    def one(name: str, *, is_headline: bool, width: int) -> Study:
        budgets = [Budget(name="a", steps=3), Budget(name="b", steps=3)]
        runs = grid({"vanilla": vanilla(width, 64)}, seeds=(0, 1, 2), budgets=budgets, recipe=Recipe())
        return Study(name=name, question="?", runs=runs, baseline="vanilla", is_headline=is_headline)

    found = distinct([one("minor", is_headline=False, width=64), one("major", is_headline=True, width=128)])
    assert [(run.options.model["hidden_size"], run.seed) for run in found] == [
        (64, 0), (128, 0), (128, 1), (64, 1), (128, 2), (64, 2),
    ]  # fmt: skip


def test_progress_counts_what_was_trained_now() -> None:
    runs = distinct([study("smoke", 257)])
    tally = Tally(runs)
    tally.set(runs[0], 1024)  # resumed here
    tally.set(runs[0], 2048)
    tally.set(runs[1], runs[1].tokens, is_done=True)
    assert (tally.done, tally.runs, tally.trained) == (1, 4, 1024 + 3072)
    assert tally.left == 2 * 3072 + 1024
    progress = StudyProgress(tally, lambda _: None)
    line = progress.line(progress._started + 10)
    assert line == "10 s: 1 of 4 runs, 4.1k of 11.3k tokens, 410 tokens/s, 18 s left"
    tally.drop(runs[0])
    assert tally.left == 2 * 3072
