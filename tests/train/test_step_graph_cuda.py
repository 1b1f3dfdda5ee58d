"""Steps replayed as a CUDA graph beside the same steps kernel by kernel."""

import gc

import pytest
import torch

from mor.train import padded_sets
from mor.train.loop import train
from mor.train.progress import SilentProgress
from mor.train.setup import build_run
from mor.train.step import device_step, optimizer_step
from mor.train.step_graph import EAGER_STEPS, CudaCapture, StepGraph, choose_run
from tests.train.alike import assert_alike, assert_values_alike
from tests.train.test_loop import At, Recorder, records
from tests.train.test_resume import Stop, die, weights
from tests.train.tiny_run import tiny_options

pytestmark = pytest.mark.gpu

STEPS, NEVER = 30, 10**9
# Kernels that add in varying order make the difference of rounding, which training lets grow.
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
MODELS = {
    "vanilla": {"router": "none", "num_recursions": 1, "sharing": "none"},
    "recursive": {"router": "none"},
    "expert_choice": {"router_aux_loss_coef": 0.1},
    "auxiliary_router": {"causal_method": "aux_router"},
    "shared": {"kv_cache": "shared"},
    "hybrid": {"kv_cache": "hybrid"},
    "random": {"router": "random"},
    "gate": {"router": "gate"},
    "dropout": {"attention_dropout": 0.1},
}
PADDED = {
    "token_choice": {"router": "token_choice", "balancing_warmup_steps": 5},
    "loss_free": {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05},
    "shared": {"router": "token_choice", "kv_cache": "shared"},
    "hybrid": {"router": "token_choice", "kv_cache": "hybrid"},
    "threshold_choice": {"router": "threshold_choice", "capacity_warmup_steps": 5},
}
TWICE = ("vanilla", "expert_choice", "random")


def build(folder, shards, **settings):
    options = tiny_options(folder, shards, **({"device": "cuda", "sequence_length": 256, "steps": STEPS} | settings))
    state, validator = build_run(options)
    state.model.train()
    return state, validator


def curve(state, run, *, between=None):
    """Losses and gradient norms of all steps; `between` is called after every fifth."""
    for step in range(STEPS):
        optimizer_step(state, 1e-2 * (1 - step / STEPS), run)
        if between is not None and step % 5 == 4:
            between()
    return state.window.values()


def graph(state, eager_steps=EAGER_STEPS):
    return StepGraph(device_step(state), CudaCapture(state.device), eager_steps=eager_steps, tell=lambda text: None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "accumulation"),
    [*((model, 1) for model in MODELS.values()), *((MODELS[name], 2) for name in TWICE)],
    ids=[*MODELS, *(f"{name}-twice" for name in TWICE)],
)
def test_replays_are_the_steps(tmp_path, shards, model, accumulation, precision):
    states, random = [], []
    for eager_steps in (NEVER, EAGER_STEPS):
        settings = {"gradient_accumulation_steps": accumulation, "precision": precision}
        state, _ = build(tmp_path, shards, model=model, **settings)
        run = graph(state, eager_steps)
        losses = curve(state, run)["loss"]
        states.append(state)
        random.append(torch.cuda.get_rng_state(state.device))
        assert (run._replay is not None) == (eager_steps == EAGER_STEPS)
    assert_alike(*states, TOLERANCE[precision])
    assert losses[-1] < losses[0]
    assert random[0].tolist() == random[1].tolist(), "the device's random generator"
    if model.get("router", "expert_choice") == "expert_choice":
        assert int(states[1].model.model.recursion.router.training_forwards) == STEPS * accumulation
    step = next(iter(states[1].optimizer.state.values()))["step"]
    assert float(step) == STEPS


@pytest.mark.parametrize("model", PADDED.values(), ids=PADDED)
def test_padded_sets_are_replayed(tmp_path, shards, model):
    """Beside sets of just the tokens, kernel by kernel."""
    states = []
    for captured in (False, True):
        state, _ = build(tmp_path, shards, model=model, precision="float32", cuda_graph=captured)
        run = choose_run(state, lambda text: None)
        curve(state, run)
        states.append(state)
    assert run._replay is not None
    assert_alike(*states, TOLERANCE["float32"])


@pytest.mark.parametrize("model", [{}, {"kv_cache": "shared"}, MODELS["vanilla"]], ids=["own", "shared", "vanilla"])
def test_attention_inside_documents_is_replayed(tmp_path, shards, model):
    found = []
    for eager_steps in (NEVER, EAGER_STEPS):
        state, _ = build(tmp_path, shards, model=model, data={"document_masking": True})
        found.append(curve(state, graph(state, eager_steps)))
    assert_values_alike(*found, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    "model", [{}, PADDED["hybrid"], PADDED["threshold_choice"]], ids=["expert", "token-hybrid", "threshold"]
)
def test_a_replay_does_not_wait_for_the_device(tmp_path, shards, model):
    state, _ = build(tmp_path, shards, model=model, cuda_graph=True)
    run = graph(state)
    for _ in range(EAGER_STEPS + 2):
        optimizer_step(state, 1e-3, run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(state, 1e-3, run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(state.window.values()["loss"])) == EAGER_STEPS + 3


@pytest.mark.parametrize("model", [{}, {"router": "random"}], ids=["expert_choice", "random"])
def test_evaluation_in_between_changes_nothing(tmp_path, shards, model):
    found = []
    for evaluates in (False, True):
        state, validator = build(tmp_path, shards, model=model, precision="float32")
        between = (lambda: validator.evaluate(state.model)) if evaluates else None  # noqa: B023
        found.append(curve(state, graph(state), between=between))
    assert_values_alike(*found, TOLERANCE["float32"])


def test_capacities_are_captured_once_they_are_still(tmp_path, shards):
    found = []
    for replays in (False, True):
        state, _ = build(tmp_path, shards, model={"capacity_warmup_steps": 15}, precision="float32")
        run = choose_run(state, lambda text: None) if replays else graph(state, NEVER)
        found.append(curve(state, run))
    assert run._replay is not None
    assert_values_alike(*found, TOLERANCE["float32"])


@pytest.mark.parametrize("model", [{}, {"router": "random"}, MODELS["vanilla"]], ids=["expert", "random", "vanilla"])
def test_a_replayed_run_resumes(tmp_path, shards, model):
    settings = {"model": model, "device": "cuda", "steps": STEPS, "sequence_length": 256, "precision": "float32"}
    progress = Recorder()
    train(tiny_options(tmp_path / "whole", shards, **settings), progress=progress)
    assert ("note", "steps are replayed as a CUDA graph from now on") in progress.calls
    with pytest.raises(Stop):
        train(tiny_options(tmp_path / "cut", shards, **settings), progress=At(13, die))
    train(tiny_options(tmp_path / "cut", shards, **settings), resume=True, progress=SilentProgress())
    whole, cut = ([line["loss"] for line in records(tmp_path / name, "training")] for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=TOLERANCE["float32"])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in a:
        if a[name].is_floating_point() and "calibration" not in name:
            assert float((a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-6)) < 0.05, name


def test_runs_with_and_without_graphs_resume_each_other(tmp_path, shards, monkeypatch):
    settings = {"device": "cuda", "steps": STEPS, "sequence_length": 256, "precision": "float32"}
    whole = train(tiny_options(tmp_path / "whole", shards, **settings), progress=SilentProgress())
    for name, first, then in (("on", True, False), ("off", False, True)):
        with pytest.raises(Stop):
            train(tiny_options(tmp_path / name, shards, cuda_graph=first, **settings), progress=At(13, die))
        again = tiny_options(tmp_path / name, shards, cuda_graph=then, **settings)
        result = train(again, resume=True, progress=SilentProgress())
        assert result.training["loss"] == pytest.approx(whole.training["loss"], rel=TOLERANCE["float32"])


def test_one_process_replays_several_models(tmp_path, shards):
    """As a study does: a graph goes with its run, and the next one's is captured beside the compiled code of both."""
    taken = []
    for number, model in enumerate([{}, MODELS["vanilla"], {}, {"router": "token_choice"}, {}]):
        settings = {"model": model, "device": "cuda", "sequence_length": 256, "steps": 12}
        result = train(tiny_options(tmp_path / str(number), shards, **settings), progress=SilentProgress())
        gc.collect()
        taken.append((result.training["loss"], torch.cuda.memory_allocated()))
    assert taken[0][0] == pytest.approx(taken[2][0], rel=TOLERANCE["bfloat16"])
    assert taken[2][0] == pytest.approx(taken[4][0], rel=TOLERANCE["bfloat16"])
    assert taken[4][1] < taken[0][1] + 2**26


def test_a_large_step_is_not_captured_unasked(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(CudaCapture, "has_room", lambda self: self._share == 1.0)
    for asked, expected in ((None, False), (True, True), (False, False)):
        progress = Recorder()
        options = tiny_options(tmp_path / str(asked), shards, device="cuda", cuda_graph=asked, steps=6)
        train(options, progress=progress)
        assert (("note", "steps are replayed as a CUDA graph from now on") in progress.calls) == expected


def test_what_is_not_captured_is_told(tmp_path, shards, monkeypatch):
    fixed, told = {"router": "fixed", "fixed_depths": [3, 1, 2]}, []
    state, _ = build(tmp_path, shards, model=fixed)
    assert choose_run(state, told.append) == device_step(state)
    with pytest.raises(ValueError, match="cuda_graph=True is impossible: router='fixed'"):
        build(tmp_path, shards, model=fixed, cuda_graph=True)
    monkeypatch.setattr(padded_sets, "LAUNCH_SECONDS", 0.0)
    state, _ = build(tmp_path, shards, model={"router": "token_choice"})
    assert choose_run(state, told.append) == device_step(state)
    first = "steps run kernel by kernel, not as a CUDA graph: "
    assert told == [
        first + "router='fixed' copies its depths from the host",
        first + "with sets of one size, router='token_choice' would compute for longer than launching takes",
    ]
