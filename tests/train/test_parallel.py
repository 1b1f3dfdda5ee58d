"""What several processes make of a run, against what one makes of it."""

import json

import pytest
import torch

from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.options import OptimizerOptions, TrainingOptions
from mor.train.parallel import OneProcess, Replicas, Shards, choose_parallel, micro_batches
from mor.train.progress import SilentProgress
from mor.train.ranks import Ranks
from tests.train import worker
from tests.train.processes import work
from tests.train.tiny_run import tiny_options

MODELS = {
    "vanilla": {"router": "none", "num_recursions": 1, "sharing": "none"},
    "expert_choice": {"router_architecture": "mlp", "capacity_warmup_steps": 12},
    "auxiliary_router": {"causal_method": "aux_router", "gating": "additive", "kv_cache": "shared"},
    "threshold_choice": {"router": "threshold_choice"},
    "token_choice": {"router": "token_choice"},
    "loss_free": {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05},
}
SETTINGS = {"steps": 6, "gradient_accumulation_steps": 4, "log_interval": 1, "checkpoint_interval": 0}
# A large epsilon: where gradients are next to nothing Adam would magnify their rounding.
OPTIMIZER = OptimizerOptions(learning_rate=1e-2, epsilon=1e-4)


def options(folder, shards, **settings):
    made = tiny_options(folder, shards, **(SETTINGS | settings))
    return type(made)(**{**vars(made), "optimizer": OPTIMIZER})


def losses(output):
    return [line["loss"] for line in read_journal(output / "metrics.jsonl") if line["kind"] == "training"]


def weights(output):
    return MorForCausalLM.from_pretrained(output / "final").state_dict()


def assert_close(one, other, tolerance=1e-5):
    """Two runs tell and end the same up to rounding."""
    assert losses(one) == pytest.approx(losses(other), abs=tolerance, rel=0)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if "calibration" not in name:
            torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance, msg=name)
    lines, others = read_journal(one / "metrics.jsonl"), read_journal(other / "metrics.jsonl")
    assert len(lines) == len(others)
    for line, other_line in zip(lines, others):
        assert line.keys() == other_line.keys()
        for name in ("kind", "step", "tokens", "epoch", "depth_histogram", "max_violation", "dead_token_ratio"):
            assert line.get(name) == pytest.approx(other_line.get(name), abs=1e-9), name
        for decision, scores in line.get("decisions", {}).items():
            assert scores["tokens"] == other_line["decisions"][decision]["tokens"]
            assert scores["nll"] == pytest.approx(other_line["decisions"][decision]["nll"], abs=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """Every model trained by one process, and by two with DDP and with FSDP2."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, model in MODELS.items():
        train(options(folder / name, shards, model=model), progress=SilentProgress())
    shared = [
        options(folder / f"{name}-{parallel}", shards, model=model, parallel=parallel)
        for name, model in MODELS.items()
        for parallel in ("ddp", "fsdp")
    ]
    work(2, worker.run, *shared)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one(runs, name, parallel):
    assert_close(runs / name, runs / f"{name}-{parallel}")


def test_copies_of_a_spread_model_train_as_one_process_and_resume(tmp_path, shards):
    """Four processes, two of which share a copy; another router each, and checkpoints for any number of processes."""
    settings = {"gradient_accumulation_steps": 8, "micro_batch_size": 1, "steps": 9, "checkpoint_interval": 4}
    made = [
        {"model": MODELS[name], **settings} | more
        for name in ("auxiliary_router", "loss_free")
        for more in ({}, {"parallel": "fsdp", "shard_size": 2})
    ]
    runs = [options(tmp_path / str(number), shards, **each) for number, each in enumerate(made)]
    for alone in (runs[0], runs[2]):
        train(alone, progress=SilentProgress())
    work(4, worker.run, runs[1])
    assert_close(tmp_path / "0", tmp_path / "1")
    work(4, worker.interrupt, runs[3])
    work(2, worker.resume, options(tmp_path / "3", shards, **(made[3] | {"shard_size": 1})))
    assert_close(tmp_path / "2", tmp_path / "3")


def test_a_replicated_run_leaves_what_one_process_leaves(runs):
    for folder in ("vanilla-ddp", "vanilla"):
        assert sorted(path.name for path in (runs / folder / "final").iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    assert json.loads((runs / "vanilla-fsdp" / "final" / "config.json").read_text()) == json.loads(
        (runs / "vanilla" / "final" / "config.json").read_text()
    )


def test_the_shared_block_is_gathered_once_per_pass(tmp_path, shards):
    """The block is one unit for its three recursions; a vanilla model's layers are one each."""
    vanilla = {"router": "none", "num_recursions": 1, "sharing": "none"}
    settings = {"parallel": "fsdp", "gradient_accumulation_steps": 2}
    made = [
        tiny_options(tmp_path, shards, **settings),
        tiny_options(tmp_path, shards, gradient_checkpointing=True, **settings),
        tiny_options(tmp_path, shards, reshard_after_forward=False, **settings),
        tiny_options(tmp_path, shards, model=vanilla, **settings),
    ]
    found = work(2, worker.gathers, *made)[0]
    block, router = "FSDP::all_gather (model.recursion)", "FSDP::all_gather (model.recursion.router)"
    for both_passes in found[:2]:
        assert (both_passes["named"][block], both_passes["named"][router]) == (2, 1)
        assert both_passes["all"] == 2 * 3 + 1 + 1  # block and outer layers twice; router and root, which stay, once
    assert (found[2]["named"][block], found[2]["all"]) == (1, 3 + 1 + 1)
    layers = {f"FSDP::all_gather (model.recursion.block.{i})": 2 for i in range(5)}
    assert (found[3]["named"], found[3]["all"]) == (layers, 2 * 5 + 1)
    assert all(each["tied"] for each in found)
    assert [each["storages"] for each in found] == [1 + 7 * 3] * 3 + [1 + 7 * 5]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path, shards):
    """In bfloat16, with the weights gathered in it."""
    made = {"device": "auto", "sequence_length": 64, "asynchronous_checkpoints": True, "checkpoint_interval": 3}
    train(options(tmp_path / "one", shards, **made), progress=SilentProgress())
    for parallel in ("ddp", "fsdp"):
        work(2, worker.run, options(tmp_path / parallel, shards, parallel=parallel, **made))
        assert losses(tmp_path / parallel) == pytest.approx(losses(tmp_path / "one"), rel=0.02)
        assert MorForCausalLM.from_pretrained(tmp_path / parallel / "final").dtype == torch.float32


def test_ranks_agree_and_tensors_come_together():
    work(3, worker.agree)


def test_micro_batches_are_shared_or_refused():
    made = TrainingOptions(micro_batch_size=4, gradient_accumulation_steps=6)
    assert [micro_batches(made, Ranks(size=size)) for size in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"steps=6 cannot be shared by 8 processes.* micro_batch_size=3 is the same"):
        micro_batches(made, Ranks(size=8))
    with pytest.raises(ValueError, match=r"it must be a multiple of 5$"):
        micro_batches(made, Ranks(size=5))


def test_the_strategy_is_chosen_by_name_or_by_size():
    config, cpu = MorConfig(num_hidden_layers=2), torch.device("cpu")

    def chosen(size=2, dtype=torch.float32, **settings):
        return choose_parallel(TrainingOptions(**settings), Ranks(size=size), config, device=cpu, dtype=dtype)

    assert isinstance(chosen(size=1, parallel="fsdp"), OneProcess)
    assert isinstance(chosen(), Replicas)
    assert isinstance(chosen(parallel="fsdp"), Shards)
    assert chosen(parallel="fsdp", dtype=torch.bfloat16).gathered_dtype == torch.bfloat16
    assert chosen(parallel="fsdp", dtype=torch.bfloat16, gather_precision="float32").gathered_dtype == torch.float32
    assert isinstance(chosen(size=4, shard_size=2), Shards)
    with pytest.raises(ValueError, match="shard_size=2 is for parallel='fsdp'; with 'ddp' nothing is spread"):
        chosen(parallel="ddp", shard_size=2)
    with pytest.raises(ValueError, match="shard_size=3 must divide the 4 processes"):
        chosen(size=4, shard_size=3)
    with pytest.raises(ValueError, match="parallel='none', but there are 2 processes"):
        chosen(parallel="none")


def test_devices_of_ranks():
    assert Ranks().device_name("cuda:1") == "cuda:1"
    assert Ranks(size=2, rank=1, local_rank=1).device_name("cpu") == "cpu"
    with pytest.raises(ValueError, match="device='cuda:1' is one device, and this run has 2 processes"):
        Ranks(size=2).device_name("cuda:1")
