"""What only a CUDA device shows: bf16 autocast, fused updates, restored states on the device."""

import pytest
import torch

from mor.train.loop import train
from mor.train.progress import SilentProgress
from mor.train.setup import build_run
from mor.train.step import optimizer_step
from tests.train.test_loop import At, records
from tests.train.test_resume import Stop, curve, die
from tests.train.tiny_run import tiny_options

pytestmark = pytest.mark.gpu

ROUTERS = [
    {"router": "none"},
    {"router": "expert_choice"},
    {"router": "expert_choice", "causal_method": "aux_router", "kv_cache": "shared"},
    {"router": "token_choice", "balancing": "loss_free"},
    {"router": "random"},
]


@pytest.mark.parametrize("model", ROUTERS, ids=lambda model: "-".join(model.values()))
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_run_trains_and_resumes(tmp_path, shards, model, precision):
    settings = {"model": model, "device": "auto", "precision": precision, "steps": 20, "sequence_length": 64}
    result = train(tiny_options(tmp_path / "whole", shards, **settings), progress=SilentProgress())
    lines = records(tmp_path / "whole", "training")
    assert lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(Stop):
        train(tiny_options(tmp_path / "cut", shards, **settings), progress=At(7, die))
    again = train(tiny_options(tmp_path / "cut", shards, **settings), resume=True, progress=SilentProgress())
    assert len(curve(tmp_path / "cut")) == len(curve(tmp_path / "whole"))
    assert again.training["loss"] == pytest.approx(result.training["loss"], rel=0.02)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_training_waits_for_the_device_only_when_it_reports(tmp_path, shards):
    """Between log lines no value is read from the device."""
    state, _ = build_run(
        tiny_options(tmp_path, shards, device="cuda", sequence_length=64, model={"router": "expert_choice"})
    )
    state.model.train()
    optimizer_step(state, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(state, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
