"""Checkpoints of several processes: resumed by any number of them, whole or not there, and nothing counted twice."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open

from mor.model.modeling_mor import MorForCausalLM
from mor.train import checkpoint
from mor.train.checkpoint import CheckpointError
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.progress import SilentProgress
from tests.train import worker
from tests.train.processes import as_json, attempt, command, free_port, rank_environment, work
from tests.train.test_parallel import assert_close, options
from tests.train.test_resume import assert_same_run, curve

MODEL = {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05}
SETTINGS = {
    "model": MODEL,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 6,
    "steps": 10,
    "log_interval": 1,
    "checkpoint_interval": 4,
}


def of(folder, shards, **settings):
    return options(folder, shards, **(SETTINGS | settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """A whole run of one process, and two stopped at step 7 by a signal to one of two ranks."""
    folder = tmp_path_factory.mktemp("distributed")
    train(of(folder / "whole", shards), progress=SilentProgress())
    work(2, worker.interrupt, of(folder / "fsdp", shards, parallel="fsdp"))
    work(2, worker.interrupt, of(folder / "ddp", shards, parallel="ddp", asynchronous_checkpoints=True))
    return folder


def stopped(runs, name, target):
    shutil.copytree(runs / name, target)
    return target


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(runs, name):
    found = checkpoint.read_latest(runs / name / "checkpoints")
    assert [path.name for path in checkpoint.list_checkpoints(runs / name / "checkpoints")] == [
        "step-00000004",
        "step-00000007",
    ]
    assert (found.step, found.values["ranks"]) == (7, 2)
    assert not (runs / name / "final").exists()


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_one_process_goes_on_where_two_stopped(runs, name, tmp_path, shards):
    output = stopped(runs, name, tmp_path / "run")
    train(of(output, shards, parallel=name), resume=True, progress=SilentProgress())
    assert_close(runs / "whole", output)


@pytest.mark.parametrize(("name", "then", "ranks"), [("fsdp", "fsdp", 3), ("ddp", "fsdp", 2), ("fsdp", "ddp", 3)])
def test_another_number_of_processes_goes_on(runs, name, then, ranks, tmp_path, shards):
    output = stopped(runs, name, tmp_path / "run")
    work(ranks, worker.resume, of(output, shards, parallel=then, asynchronous_checkpoints=then == "fsdp"))
    assert_close(runs / "whole", output)
    assert checkpoint.read_latest(output / "checkpoints").values["ranks"] == ranks


def test_several_go_on_where_one_stopped(runs, tmp_path, shards):
    output = tmp_path / "run"
    shutil.copytree(runs / "whole", output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "step-00000010")
    work(2, worker.resume, of(output, shards, parallel="fsdp"))
    assert_close(runs / "whole", output)


def test_a_sharded_checkpoint_is_a_model_and_holds_no_pickle(runs):
    folder = runs / "fsdp" / "checkpoints" / "step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "training_state-00001-of-00002.safetensors",
        "training_state-00002-of-00002.safetensors",
        "training_state.json",
    ]
    model = MorForCausalLM.from_pretrained(folder)
    other = MorForCausalLM.from_pretrained(runs / "ddp" / "checkpoints" / "step-00000007")
    assert type(model) is MorForCausalLM
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-5, equal_nan=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    sizes = [path.stat().st_size for path in folder.glob("*-of-00002.safetensors")]
    assert max(sizes) < 0.7 * sum(sizes)
    with safe_open(folder / "model-00001-of-00002.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_damaged_part_costs_only_the_steps_since_the_checkpoint_before(runs, tmp_path, shards):
    output = stopped(runs, "fsdp", tmp_path / "run")
    os.truncate(output / "checkpoints" / "step-00000007" / "training_state-00002-of-00002.safetensors", 100)
    work(2, worker.resume, of(output, shards, parallel="fsdp"))
    assert_close(runs / "whole", output)


def test_one_rank_that_cannot_write_fails_all_and_leaves_the_checkpoint_before(tmp_path, shards):
    made = of(tmp_path / "run", shards, parallel="fsdp", checkpoint_interval=2)
    messages = work(2, worker.fill_disk, made)
    for message in messages:
        assert "could not write checkpoint" in message
        assert "step-00000002 is still intact" in message
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000002"]


def test_a_lost_rank_and_a_restart_count_nothing_twice(tmp_path, shards):
    made = of(tmp_path / "run", shards, parallel="fsdp")
    outcomes = attempt(2, worker.die_once, made)
    assert [bool(error) for _, error in outcomes] == [True, True]
    assert outcomes[1] == (None, "died")
    work(2, worker.die_once, made, restarts=1)
    work(2, worker.run, of(tmp_path / "whole", shards, parallel="fsdp"))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_starts_again_after_it_lost_a_rank(tmp_path, shards):
    made = of(tmp_path / "run", shards, parallel="fsdp")
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = command("-m", "torch.distributed.run", *words, "-m", "tests.train.worker", as_json(made))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    lines = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "training"] == list(range(1, 11))
    train(of(tmp_path / "whole", shards), progress=SilentProgress())
    assert_close(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_all_ranks_of_the_command_saves_once_and_exits_0(tmp_path, shards):
    from mor.files import write_text

    write_text(tmp_path / "options.yaml", as_json(of(tmp_path / "run", shards, parallel="ddp", steps=100_000)))
    port = free_port()
    words = ["-m", "mor", "train", "--options", str(tmp_path / "options.yaml")]
    processes = [command(*words, **rank_environment(rank, 2, port)) for rank in range(2)]
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    step = checkpoint.read_latest(tmp_path / "run" / "checkpoints").step
    assert f"stopped at step {step}" in outputs[0]
    assert "stopped" not in outputs[1]


def test_asynchronous_checkpoints_of_one_process_change_nothing(tmp_path, shards):
    whole, beside = tmp_path / "whole", tmp_path / "beside"
    train(of(whole, shards), progress=SilentProgress())
    train(of(beside, shards, asynchronous_checkpoints=True), progress=SilentProgress())
    assert_same_run(whole, beside)
    shutil.rmtree(beside / "checkpoints" / "step-00000010")
    train(of(beside, shards, asynchronous_checkpoints=True), resume=True, progress=SilentProgress())
    assert_same_run(whole, beside)


def test_an_asynchronous_failure_shows_at_the_next_checkpoint(tmp_path, shards, monkeypatch):
    original = MorForCausalLM.save_pretrained

    def save(self, folder, **kwargs):
        original(self, folder, **kwargs)
        if "step-00000008" in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(MorForCausalLM, "save_pretrained", save)
    with pytest.raises(CheckpointError, match=r"step-00000008: .*the disk is full.*; .*step-00000004 is still intact"):
        train(of(tmp_path / "run", shards, asynchronous_checkpoints=True), progress=SilentProgress())
    assert checkpoint.read_latest(tmp_path / "run" / "checkpoints").step == 4
