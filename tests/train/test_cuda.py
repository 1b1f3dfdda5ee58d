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
    {"router": "threshold_choice"},
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


@pytest.mark.parametrize("documents", [False, True], ids=["across", "inside"])
@pytest.mark.parametrize(
    "model",
    [
        {"router": "expert_choice"},
        {"router": "expert_choice", "kv_cache": "shared"},
        {"router": "threshold_choice"},
        {"router": "gate"},
        {"router": "fixed", "fixed_depths": [3, 1, 2]},
    ],
    ids=lambda model: "-".join(value for value in model.values() if isinstance(value, str)),
)
def test_training_waits_for_the_device_only_when_it_reports(tmp_path, shards, model, documents):
    """Between log lines no value is read from the device; rows are long enough for the block-sparse kernels."""
    settings = {"device": "cuda", "sequence_length": 512, "evaluation_tokens": 0, "cuda_graph": False}
    state, _ = build_run(tiny_options(tmp_path, shards, model=model, data={"document_masking": documents}, **settings))
    state.model.train()
    for _ in range(2):  # the second may compile for another number of tokens
        optimizer_step(state, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(state, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 3
