"""A run whose steps are replayed equals one whose steps are taken, with a stand-in for CUDA graphs on the CPU."""

import dataclasses

import pytest
import torch

from mor.model.backbone import MorModel
from mor.train import loop
from mor.train.fused_loss import ChunkedLmLoss
from mor.train.loop import train
from mor.train.options import TrainingOptions
from mor.train.progress import SilentProgress
from mor.train.ranks import Ranks
from mor.train.setup import build_run
from mor.train.step import device_step, optimizer_step
from mor.train.step_graph import EAGER_STEPS, StepGraph, check_cuda_graph, obstacle, warmup_steps_left
from tests.tiny import tiny_config, tiny_model
from tests.train.recording import RecordingCapture
from tests.train.test_loop import At, Recorder, records
from tests.train.test_resume import Stop, assert_same_run, die
from tests.train.tiny_run import tiny_options

CUDA = torch.device("cuda")
REPLAYED = {
    "vanilla": {"router": "none", "num_recursions": 1, "sharing": "none"},
    "recursive": {"router": "none"},
    "expert_choice": {"router_z_loss_coef": 0.1},
    "auxiliary_router": {"causal_method": "aux_router"},
    "shared": {"kv_cache": "shared"},
    "hybrid": {"kv_cache": "hybrid"},
    "dropout": {"attention_dropout": 0.1},
    "random": {"router": "random"},
    "gate": {"router": "gate"},
}
PADDED = {
    "token_choice": {"router": "token_choice"},
    "token_loss_free": {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05},
    "token_shared": {"router": "token_choice", "kv_cache": "shared", "balancing_warmup_steps": 5},
    "token_hybrid": {"router": "token_choice", "kv_cache": "hybrid"},
    "threshold_choice": {"router": "threshold_choice", "capacity_warmup_steps": 5},
    "threshold_shared": {"router": "threshold_choice", "kv_cache": "shared", "router_z_loss_coef": 0.1},
}
TAKEN = {
    "token_choice": {"router": "token_choice"},
    "threshold_choice": {"router": "threshold_choice"},
    "fixed": {"router": "fixed", "fixed_depths": [3, 1, 2]},
}


@pytest.fixture(autouse=True)
def unchecked_tokens(monkeypatch):
    """On a GPU nobody reads the tokens to see whether they are in the vocabulary."""
    monkeypatch.setattr(MorModel, "_embed", lambda self, ids, embeds: self.embed_tokens(ids))


def tell_no_one(text):
    pass


def build(folder, shards, *, pads_sets=False, **settings):
    state, _ = build_run(tiny_options(folder, shards, evaluation_tokens=0, calibration_tokens=0, **settings))
    if state.model.model.recursion.router is not None:
        state.model.model.recursion.router.pads_sets = pads_sets
    state.model.train()
    state.lm_loss = ChunkedLmLoss(chunk=20, compiled=False)
    return state


def graph_of(state, capture, eager_steps=EAGER_STEPS, **changes):
    step = dataclasses.replace(device_step(state), **changes)
    return StepGraph(step, capture, eager_steps=eager_steps, tell=tell_no_one)


def take(state, run, steps):
    for step in range(steps):
        optimizer_step(state, 1e-2 / (step + 1), run)


def assert_same(one, other):
    assert one.window.values() == other.window.values()
    assert one.window.summary() == other.window.summary()
    tensors, others = one.tensors() | dict(one.model.state_dict()), other.tensors() | dict(other.model.state_dict())
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name].nan_to_num(9), others[name].nan_to_num(9)), name


@pytest.mark.parametrize(
    ("model", "documents"),
    [*((model, False) for model in (REPLAYED | PADDED).values()), ({}, True), ({"kv_cache": "shared"}, True)],
    ids=[*REPLAYED, *PADDED, "inside-documents", "shared-inside-documents"],
)
def test_replayed_steps_are_the_steps(tmp_path, shards, model, documents):
    runs = []
    for capture in (None, RecordingCapture()):
        state = build(tmp_path, shards, pads_sets=True, model=model, data={"document_masking": documents})
        take(state, graph_of(state, capture or RecordingCapture(), eager_steps=EAGER_STEPS if capture else 99), 6)
        runs.append(state)
    assert len(capture.recorded) == 1 and len(capture.recorded[0].done) > 100
    assert_same(*runs)
    assert (runs[0].step, runs[0].tokens, runs[0].positions) == (runs[1].step, runs[1].tokens, runs[1].positions)
    assert all(parameter.grad is None for parameter in runs[1].model.parameters())


def test_weights_are_rounded_anew_in_every_replay(tmp_path, shards):
    """Autocast remembers rounded weights until its context ends."""
    losses = []
    for eager_steps in (2, 99):
        state = build(tmp_path, shards)
        take(state, graph_of(state, RecordingCapture(), eager_steps, dtype=torch.bfloat16), 6)
        losses.append(state.window.values()["loss"])
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


def test_forwards_are_counted_in_replays(tmp_path, shards):
    state = build(tmp_path, shards)
    take(state, graph_of(state, RecordingCapture()), 7)
    assert int(state.model.model.recursion.router.training_forwards) == 7 * 2


@pytest.mark.parametrize("model", TAKEN.values(), ids=TAKEN)
def test_what_is_not_captured_could_not_be(tmp_path, shards, model):
    state = build(tmp_path, shards, model=model)
    with pytest.raises(RuntimeError, match=r"training\.cuda_graph=false trains without") as error:
        take(state, graph_of(state, RecordingCapture()), EAGER_STEPS + 1)
    assert "is read" in str(error.value.__cause__) or "from the host" in str(error.value.__cause__)


@pytest.mark.parametrize("model", (REPLAYED | PADDED).values(), ids=REPLAYED | PADDED)
def test_what_can_be_captured_is_not_refused(model):
    config = tiny_config(**({"num_recursions": 3, "sharing": "middle_cycle", "router": "expert_choice"} | model))
    assert obstacle(TrainingOptions(), config, CUDA, Ranks()) is None


def test_a_graph_that_is_asked_for_and_impossible_is_an_error(tmp_path, shards):
    with pytest.raises(ValueError, match="cuda_graph=True is impossible: the device is cpu"):
        build(tmp_path, shards, cuda_graph=True)
    refused = [
        (TrainingOptions(gradient_checkpointing=True), tiny_config(), Ranks(), "gradient_checkpointing"),
        (TrainingOptions(), tiny_config(), Ranks(size=2), "2 processes"),
        (TrainingOptions(), tiny_config(router="fixed"), Ranks(), "router='fixed'"),
        (
            TrainingOptions(),
            tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            Ranks(),
            "rope_type='dynamic'",
        ),
    ]
    for training, config, ranks, why in refused:
        assert check_cuda_graph(training, config, CUDA, ranks) is None
        with pytest.raises(ValueError, match=why):
            check_cuda_graph(dataclasses.replace(training, cuda_graph=True), config, CUDA, ranks)


def test_without_room_steps_are_taken(tmp_path, shards):
    state, capture, told = build(tmp_path, shards), RecordingCapture(has_room=False), []
    run = StepGraph(device_step(state), capture, eager_steps=2, tell=told.append)
    take(state, run, 5)
    assert not capture.recorded and len(state.window) == 5 and capture.steps_aside == 2
    assert told == ["steps run kernel by kernel, not as a CUDA graph: it would take too much"]


def test_warm_capacities_are_waited_for(tmp_path, shards):
    model = tiny_model(router="expert_choice", capacity_warmup_steps=7)
    assert warmup_steps_left(model, 2) == 4
    model.model.recursion.router.training_forwards.fill_(6)
    assert warmup_steps_left(model, 2) == 1
    model.model.recursion.router.training_forwards.fill_(60)
    assert warmup_steps_left(model, 2) == 0
    assert warmup_steps_left(tiny_model(), 2) == 0
    assert warmup_steps_left(tiny_model(router="token_choice", balancing_warmup_steps=5), 2) == 3
    runs = []
    for eager_steps in (4, 99):
        state = build(tmp_path, shards, model={"capacity_warmup_steps": 7})
        take(state, graph_of(state, RecordingCapture(), eager_steps), 8)
        runs.append(state)
    assert_same(*runs)


@pytest.fixture
def replaying(monkeypatch):
    """Lets runs on the CPU replay their steps; gives the captures."""
    captures = []

    def choose(state, tell):
        captures.append(RecordingCapture())
        return StepGraph(device_step(state), captures[-1], tell=tell)

    monkeypatch.setattr(loop, "choose_run", choose)
    return captures


@pytest.mark.parametrize("model", [{"attention_dropout": 0.1}, {"router": "random"}], ids=["dropout", "random"])
def test_a_replayed_run_resumes_bit_for_bit(tmp_path, shards, replaying, model):
    """Evaluations and checkpoints lie between the replays, and the cut run replays before and after the cut."""
    settings = {"model": model, "steps": 16}
    progress = Recorder()
    train(tiny_options(tmp_path / "whole", shards, **settings), progress=progress)
    assert ("note", "steps are replayed as a CUDA graph from now on") in progress.calls
    with pytest.raises(Stop):
        train(tiny_options(tmp_path / "cut", shards, **settings), progress=At(9, die))
    train(tiny_options(tmp_path / "cut", shards, **settings), resume=True, progress=SilentProgress())
    assert [len(capture.recorded) for capture in replaying] == [1, 1, 1]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_replayed_run_is_the_run_and_either_resumes_the_other(tmp_path, shards, monkeypatch, replaying):
    replayed = loop.choose_run
    train(tiny_options(tmp_path / "replayed", shards), progress=SilentProgress())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "choose_run", lambda state, tell: device_step(state))
        train(tiny_options(tmp_path / "taken", shards), progress=SilentProgress())
        with pytest.raises(Stop):
            train(tiny_options(tmp_path / "mixed", shards), progress=At(5, die))
        patch.setattr(loop, "choose_run", replayed)
        train(tiny_options(tmp_path / "mixed", shards), resume=True, progress=SilentProgress())
    final = {name: losses(tmp_path / name) for name in ("replayed", "taken", "mixed")}
    assert final["replayed"] == pytest.approx(final["taken"], rel=1e-5)  # float32 rates beside double ones
    assert final["mixed"] == pytest.approx(final["taken"], rel=1e-5)


def losses(folder):
    return [record["loss"] for record in records(folder, "training")]


def test_the_stand_in_is_strict():
    """A recording changes nothing, a replay runs no Python, and no value may be read."""
    total, calls = torch.zeros(2), []
    out = {}

    def program():
        calls.append(1)
        total.add_(1)
        out["double"] = total * 2

    replay = RecordingCapture().record(program)
    assert total.tolist() == [0, 0]
    replay()
    replay()
    assert total.tolist() == [2, 2] and out["double"].tolist() == [4, 4] and len(calls) == 1
    with pytest.raises(RuntimeError, match="a value is read"):
        RecordingCapture().record(lambda: total.sum().item())
