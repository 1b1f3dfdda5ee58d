"""A run that was stopped and resumed ends bit for bit like one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mor.config import to_dict
from mor.train import checkpoint
from mor.train.checkpoint import CheckpointError
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.pace import MACHINE_KEYS
from mor.train.progress import SilentProgress
from tests.train.test_loop import At, Recorder
from tests.train.tiny_run import tiny_options

ROOT = Path(__file__).parents[2]


def curve(output):
    """Every line of metrics.jsonl, as written, without what the machine decides."""
    lines = read_journal(output / "metrics.jsonl")
    return [json.dumps({key: value for key, value in line.items() if key not in MACHINE_KEYS}) for line in lines]


def weights(output):
    return load_file(output / "final" / "model.safetensors")


def assert_same_run(one, other):
    assert curve(one) == curve(other)
    for name in ("config.json", "tokenizer.json"):
        assert (one / "final" / name).read_text() == (other / "final" / name).read_text()
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(9), b[name].nan_to_num(9)), name


class Stop(Exception):
    """The process dies here, without a word."""


def die():
    raise Stop


MODELS = {
    "expert_choice": {"capacity_warmup_steps": 15, "attention_dropout": 0.1},
    "auxiliary_router": {"causal_method": "aux_router"},
    "threshold_choice": {"router": "threshold_choice", "capacity_warmup_steps": 7},
    "loss_free": {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05},
    "random": {"router": "random"},
    "recursive": {"router": "none"},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_resumed_from_its_last_checkpoint_is_the_same_run(tmp_path, shards, model):
    """Checkpoints fall into the middle of log intervals; the process dies after lines that are not in a checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"model": model, "log_interval": 3, "checkpoint_interval": 4, "data": {"document_masking": True}}
    train(tiny_options(whole, shards, **settings), progress=SilentProgress())
    with pytest.raises(Stop):
        train(tiny_options(cut, shards, **settings), progress=At(7, die))
    assert read_journal(cut / "metrics.jsonl")[-1]["step"] == 6
    random.random()
    torch.manual_seed(99)
    result = train(tiny_options(cut, shards, **settings), resume=True, progress=SilentProgress())
    assert result.step == 12
    assert_same_run(whole, cut)


def test_resuming_a_finished_run_finishes_it_again(tmp_path, shards):
    output = tmp_path / "run"
    first = train(tiny_options(output, shards), progress=SilentProgress())
    before, lines = weights(output), curve(output)
    progress = Recorder()
    second = train(tiny_options(output, shards), resume=True, progress=progress)
    assert (first, lines) == (second, curve(output))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(output).items())
    assert "resuming from" in dict(progress.calls)["note"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, shards):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_options(whole, shards), progress=SilentProgress())
    with pytest.raises(Stop):
        train(tiny_options(cut, shards), progress=At(3, die))
    with pytest.warns(UserWarning, match=r"no checkpoint in .*cut to resume: starting at step 0"):
        train(tiny_options(cut, shards), resume=True, progress=SilentProgress())
    assert_same_run(whole, cut)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, shards):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_options(whole, shards), progress=SilentProgress())
    with pytest.raises(Stop):
        train(tiny_options(cut, shards), progress=At(10, die))
    damaged = cut / "checkpoints" / "step-00000008" / "model.safetensors"
    os.truncate(damaged, 1000)
    with pytest.warns(UserWarning, match=r"step-00000008/model.safetensors is truncated.*; going back"):
        train(tiny_options(cut, shards), resume=True, progress=SilentProgress())
    assert_same_run(whole, cut)
    assert checkpoint.read(damaged.parent).step == 8


def test_nothing_is_touched_when_no_checkpoint_can_be_used(tmp_path, shards):
    output = tmp_path / "run"
    with pytest.raises(Stop):
        train(tiny_options(output, shards), progress=At(7, die))
    os.truncate(output / "checkpoints" / "step-00000004" / "training_state.safetensors", 10)
    before = (output / "metrics.jsonl").read_bytes()
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used; .*training_state.safetensors"),
    ):
        train(tiny_options(output, shards), resume=True, progress=SilentProgress())
    assert (output / "metrics.jsonl").read_bytes() == before


def test_other_options_or_other_data_are_refused(tmp_path, shards):
    from tests.train.tiny_run import make_shards

    output = tmp_path / "run"
    with pytest.raises(Stop):
        train(tiny_options(output, shards), progress=At(7, die))
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"option 'training\.gradient_accumulation_steps' was 2 and is now 4"):
        train(tiny_options(output, shards, gradient_accumulation_steps=4), resume=True, progress=SilentProgress())
    other = make_shards(tmp_path / "other", documents=50)
    with pytest.raises(ValueError, match=r"loader state belongs to other token shards than .*other"):
        train(tiny_options(output, other), resume=True, progress=SilentProgress())
    assert (output / "metrics.jsonl").read_bytes() == before


PROGRAM = """
import json, sys, warnings
from mor.config import from_dict
from mor.train.loop import train
from mor.train.options import RunOptions
from mor.train.progress import SilentProgress
train(from_dict(RunOptions, json.loads(sys.argv[1])), resume=True, progress=SilentProgress())
"""


def start(options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(to_dict(options))]
    return subprocess.Popen(command, env=environment)


def kill_at_a_random_moment(process, output, moments):
    """SIGKILL when the process has written a line and then a random time has passed, if it is not done by then."""
    lines = output / "metrics.jsonl"
    begun = lines.stat().st_size if lines.exists() else 0
    while process.poll() is None and not (lines.exists() and lines.stat().st_size != begun):
        time.sleep(0.002)
    time.sleep(moments.uniform(0.0, 0.7))
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)


def test_a_killed_process_resumed_writes_the_same_loss_curve(tmp_path, shards):
    """The curve of a run killed twice equals the uninterrupted one, character for character, and so do the weights."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    settings = {"steps": 80, "log_interval": 2, "checkpoint_interval": 3, "evaluation_interval": 20}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_options(whole, shards, **settings), progress=SilentProgress())
    options = tiny_options(cut, shards, **settings)
    for _ in range(2):
        kill_at_a_random_moment(start(options), cut, moments)
    train(options, resume=True, progress=SilentProgress())
    assert_same_run(whole, cut)
