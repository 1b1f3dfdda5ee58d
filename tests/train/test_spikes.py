import json
import random

import pytest
import torch

from mor.model.modeling_mor import MorForCausalLM
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.progress import SilentProgress
from mor.train.setup import build_run
from mor.train.spikes import FEWEST_STEPS, SpikeError, SpikeRule, describe, find_spikes
from tests.train.test_loop import At, Recorder
from tests.train.test_resume import Stop, assert_same_run, die
from tests.train.tiny_run import tiny_options

RULE = SpikeRule(threshold=8.0, window=100)


def test_the_limit_is_median_and_deviations_above_it():
    before = [1.0, 2.0, 3.0, 4.0, 5.0] * 4  # median 3, absolute deviations 2 1 0 1 2, their median 1
    assert RULE.limit(before) == pytest.approx(3 + 8 * 1.4826)
    assert SpikeRule(threshold=2.0, window=100).limit(before) == pytest.approx(3 + 2 * 1.4826)


def test_a_spike_among_the_steps_before_hardly_moves_the_limit():
    assert RULE.limit([2.0, 2.1, 2.2] * 7 + [1e6]) < 4


def test_a_loss_that_stands_still_may_change_a_little():
    assert RULE.limit([2.0] * 50) == pytest.approx(2.0 + 8 * 0.02)


def test_too_few_steps_tell_nothing_and_none_turns_it_off():
    assert RULE.limit([1.0] * (FEWEST_STEPS - 1)) is None
    assert RULE.limit([1.0] * FEWEST_STEPS) is not None
    assert SpikeRule(threshold=8.0, window=4).limit([1.0] * 4) is not None
    assert SpikeRule(threshold=None, window=100).limit([1.0] * 50) is None


def make_state(tmp_path, shards, **training):
    return build_run(tiny_options(tmp_path / "run", shards, evaluation_tokens=0, calibration_tokens=0, **training))[0]


def take(state, values):
    """Take steps with these losses; what was found after the last of them."""
    for value in values:
        state.step += 1
        state.positions.append({"row": state.step})
        state.window.add_step({"loss": torch.tensor(value), "gradient_norm": torch.tensor(1.0)})
    return find_spikes(state, state.window.values())


def test_what_is_found_does_not_depend_on_when_a_run_looks(tmp_path, shards):
    noise = random.Random(0)
    losses = [2.0 + noise.gauss(0, 0.05) for _ in range(60)]
    losses[30], losses[31], losses[50] = 4.0, 3.5, 2.7
    at_once, in_parts = make_state(tmp_path, shards), make_state(tmp_path / "b", shards)
    found = take(at_once, losses)
    pieces = [take(in_parts, losses[start : start + 7]) for start in range(0, 60, 7)]
    assert [(spike["step"], spike["name"]) for spike in found] == [(31, "loss"), (32, "loss"), (51, "loss")]
    assert [spike for piece in pieces for spike in piece] == found
    assert [spike["data_position"] for spike in found] == [{"row": 31}, {"row": 32}, {"row": 51}]
    assert found[0]["value"] == 4.0
    assert found[0]["median"] == pytest.approx(2.0, abs=0.05)
    assert found[0]["median"] < found[0]["limit"] < 2.7
    assert describe(found) == f"loss 4 at step 31, where {found[0]['median']:.4g} was usual, and 2 more"
    assert (at_once.judged, at_once.spikes) == (in_parts.judged, in_parts.spikes) == (60, 3)
    assert len(at_once.recent["loss"]) == 60
    take(at_once, [2.0] * 60)
    assert len(at_once.recent["loss"]) == 100


def test_a_checkpoint_in_writing_keeps_the_state_of_its_step(tmp_path, shards):
    state = make_state(tmp_path, shards)
    take(state, [2.0, 2.1])
    counters = state.values()["counters"]
    before = json.dumps(counters)
    take(state, [5.0])
    state.positions.clear()
    assert json.dumps(counters) == before


@pytest.fixture
def jump(monkeypatch):
    """Lets the loss of the forwards of step 22 be ten times what it is; steps have two forwards."""
    original = MorForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if self.training and int(self.model.recursion.router.training_forwards) in (43, 44):
            output.loss = output.loss * 100
        return output

    monkeypatch.setattr(MorForCausalLM, "forward", forward)


SETTINGS = {"steps": 30, "log_interval": 5, "checkpoint_interval": 4, "evaluation_interval": 0}


def test_a_spike_is_noted_and_training_goes_on(tmp_path, shards, jump):
    progress, output = Recorder(), tmp_path / "run"
    result = train(tiny_options(output, shards, **SETTINGS), progress=progress)
    assert result.step == 30
    spikes = read_journal(output / "spikes.jsonl")
    assert {(spike["step"], spike["name"]) for spike in spikes} >= {(22, "loss"), (22, "gradient_norm")}
    loss = next(spike for spike in spikes if spike["name"] == "loss")
    assert loss["value"] > 5 * loss["median"]
    assert loss["data_position"].keys() == build_run(tiny_options(output, shards))[0].loader.state_dict().keys()
    notes = [text for name, text in progress.calls if name == "note"]
    assert any(text.startswith(f"spike: loss {loss['value']:.4g} at step 22, where") for text in notes)
    counts = {line["step"]: line["spikes"] for line in read_journal(output / "metrics.jsonl") if "spikes" in line}
    assert (counts[20], counts[30]) == (0, len(spikes))


@pytest.mark.parametrize(("step", "checkpoint_interval"), [(21, 4), (24, 4), (26, 10)])
def test_spikes_survive_a_kill_and_none_is_written_twice(tmp_path, shards, jump, step, checkpoint_interval):
    """Killed before the spike at step 22, after a checkpoint that knows it, and when only spikes.jsonl knows it."""
    settings = SETTINGS | {"checkpoint_interval": checkpoint_interval}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_options(whole, shards, **settings), progress=SilentProgress())
    with pytest.raises(Stop):
        train(tiny_options(cut, shards, **settings), progress=At(step, die))
    assert (cut / "spikes.jsonl").exists() == (step > 22)
    train(tiny_options(cut, shards, **settings), resume=True, progress=SilentProgress())
    assert (cut / "spikes.jsonl").read_text() == (whole / "spikes.jsonl").read_text() != ""
    assert_same_run(whole, cut)


def test_a_run_can_stop_there_and_go_on_when_told_to(tmp_path, shards, jump):
    output = tmp_path / "run"
    with pytest.raises(
        SpikeError, match=r"loss .* at step 22, where .*; last checkpoint: step 20; see .*failure\.json"
    ):
        train(tiny_options(output, shards, **SETTINGS, stop_at_spike=True), progress=SilentProgress())
    failure = json.loads((output / "failure.json").read_text())
    spike = read_journal(output / "spikes.jsonl")[0]
    assert (failure["step"], failure["last_checkpoint"]) == (22, 20)
    assert failure["values"] == {"loss": spike["value"]}
    assert failure["data_position"] == spike["data_position"]
    assert train(tiny_options(output, shards, **SETTINGS), resume=True, progress=SilentProgress()).step == 30
    assert read_journal(output / "spikes.jsonl")[0] == spike
    assert not (output / "failure.json").exists()


def test_without_a_threshold_nothing_is_found(tmp_path, shards, jump):
    train(tiny_options(tmp_path / "run", shards, **SETTINGS, spike_threshold=None), progress=SilentProgress())
    assert not (tmp_path / "run" / "spikes.jsonl").exists()


@pytest.mark.parametrize(("name", "value"), [("spike_threshold", 0.0), ("spike_window", 1)])
def test_rules_that_cannot_be(tmp_path, shards, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tiny_options(tmp_path, shards, **{name: value})
