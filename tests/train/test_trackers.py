import json
import random
import sys
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mor.train import random_state
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.options import TrainingOptions
from mor.train.progress import SilentProgress
from mor.train.trackers import flatten, open_trackers
from tests.train.test_loop import At
from tests.train.test_resume import Stop, assert_same_run, die
from tests.train.tiny_run import tiny_options


def test_names_are_flat():
    line = {
        "kind": "training",
        "step": 3,
        "loss": 2.5,
        "losses": {"lm": 2.0},
        "depth_histogram": [0.0, 0.75, 0.25],
        "capacities": [1.0, 0.25],
    }
    assert flatten(line) == {
        "training/loss": 2.5,
        "training/losses/lm": 2.0,
        "training/depth_histogram/0": 0.0,
        "training/depth_histogram/1": 0.75,
        "training/depth_histogram/2": 0.25,
        "training/capacities/1": 1.0,
        "training/capacities/2": 0.25,
    }
    scores = {"causal": {"nll": 2.0}, "top_k": {"nll": 1.5}}
    line = {"kind": "evaluation", "step": 3, "tokens": 9, "decisions": scores}
    assert flatten(line) == {"evaluation/causal/nll": 2.0, "evaluation/top_k/nll": 1.5}


def read_events(output):
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_holds_what_the_journal_holds_once_after_a_kill(tmp_path, shards):
    """Killed after lines that no checkpoint knows: TensorBoard saw them twice and shows them once."""
    output = tmp_path / "run"
    options = tiny_options(output, shards, trackers=("tensorboard",))
    with pytest.raises(Stop):
        train(options, progress=At(7, die))
    assert [event.step for event in read_events(output).Scalars("training/loss")] == [3, 6]
    train(options, resume=True, progress=SilentProgress())
    events, lines = read_events(output), read_journal(output / "metrics.jsonl")
    expected = {}
    for line in lines:
        for name, value in flatten(line).items():
            expected.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]} == expected
    histogram = events.Histograms("training/depths")[-1].histogram_value
    assert histogram.bucket == pytest.approx(lines[-2]["depth_histogram"])
    assert histogram.bucket_limit == [0.5, 1.5, 2.5, 3.5]
    assert "options/text_summary" in events.Tags()["tensors"]


def test_a_tracked_run_is_the_same_run(tmp_path, shards):
    train(tiny_options(tmp_path / "tracked", shards, trackers=("tensorboard",)), progress=SilentProgress())
    train(tiny_options(tmp_path / "plain", shards), progress=SilentProgress())
    assert_same_run(tmp_path / "tracked", tmp_path / "plain")


class FakeRun:
    """Remembers what it is told, and draws random numbers as libraries may."""

    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb; its runs are in `wandb.runs`."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.init = lambda **settings: module.runs.append(FakeRun(**settings)) or module.runs[-1]
    module.Histogram = lambda np_histogram: ("histogram", np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, shards, wandb):
    output = tmp_path / "a-run"
    options = tiny_options(output, shards, trackers=("wandb",))
    with pytest.raises(Stop):
        train(options, progress=At(7, die))
    train(options, resume=True, progress=SilentProgress())
    first, second = wandb.runs
    assert first.settings == second.settings
    assert first.settings["id"] == json.loads((output / "wandb.json").read_text())["id"]
    assert (first.settings["project"], first.settings["name"], first.settings["resume"]) == ("mor", "a-run", "allow")
    assert first.settings["config"]["training"]["steps"] == 12
    assert first.finished and second.finished
    assert [step for step, _ in first.logged] == [3, 6, 6]
    assert [step for step, _ in second.logged] == [6, 6, 9, 12, 12]
    lines = [line for line in read_journal(output / "metrics.jsonl") if line["step"] > 4]
    for line, (step, numbers) in zip(lines, second.logged, strict=True):
        histogram = numbers.pop("training/depths", None)
        assert (step, numbers) == (line["step"], flatten(line))
        if line["kind"] == "training":
            assert histogram == ("histogram", (line["depth_histogram"], [-0.5, 0.5, 1.5, 2.5, 3.5]))


def test_a_run_that_begins_again_is_another_run(tmp_path, shards, wandb):
    options = tiny_options(tmp_path, shards, trackers=("wandb",))
    for step in (0, 0, 4):
        open_trackers(options, tmp_path, step)
    first, second, third = (run.settings["id"] for run in wandb.runs)
    assert first != second == third


def test_opening_a_tracker_draws_nothing(tmp_path, shards, wandb):
    tensors, values = random_state.capture()
    open_trackers(tiny_options(tmp_path, shards, trackers=("wandb",)), tmp_path, 0)
    tensors_after, values_after = random_state.capture()
    assert values_after == values
    assert all(torch.equal(tensors_after[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_written(tmp_path, shards, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"training\.trackers='{name}' needs {name}: pip install 'mor\[{name}\]'"):
        train(tiny_options(tmp_path / "run", shards, trackers=(name,)), progress=SilentProgress())
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="trackers='wanbd' is unknown; choose one of 'tensorboard', 'wandb'"):
        TrainingOptions(trackers=("wanbd",))  # type: ignore[arg-type]
