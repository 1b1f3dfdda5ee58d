import json
import math
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mor.model.cost import training_flops
from mor.model.modeling_mor import MorForCausalLM
from mor.train import checkpoint
from mor.train.checkpoint import CheckpointError
from mor.train.journal import read_journal
from mor.train.loop import NonFiniteLossError, train
from mor.train.progress import SilentProgress
from tests.train.tiny_run import tiny_options


def records(output, kind):
    return [record for record in read_journal(output / "metrics.jsonl") if record["kind"] == kind]


class Recorder(SilentProgress):
    """Remembers what it is told."""

    def __init__(self):
        self.calls = []

    def start(self, **values):
        self.calls.append(("start", values))

    def advance(self, step):
        self.calls.append(("advance", step))

    def note(self, text):
        self.calls.append(("note", text))

    def close(self):
        self.calls.append(("close", None))


class At(SilentProgress):
    """Acts once, after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def advance(self, step):
        if step == self.step:
            self.action()


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    """A finished run of expert-choice: (output, result, what progress was told)."""
    output, progress = tmp_path_factory.mktemp("loop") / "run", Recorder()
    return output, train(tiny_options(output, shards, steps=40, log_interval=5), progress=progress), progress.calls


def test_the_run_folder_holds_everything(run):
    output, result, _ = run
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "final",
        "metrics.jsonl",
        "options.json",
        "summary.json",
    ]
    assert [path.name for path in checkpoint.list_checkpoints(output / "checkpoints")] == [
        "step-00000036",
        "step-00000040",
    ]
    assert (result.step, result.interrupted, result.model) == (40, False, output / "final")


def test_it_learns(run):
    losses = [record["loss"] for record in records(run[0], "training")]
    assert losses[-1] < 0.75 * losses[0]
    bits = [record["decisions"]["causal"]["bits_per_byte"] for record in records(run[0], "evaluation")]
    assert bits[-1] < bits[0]


def test_training_lines_carry_the_measures(run):
    lines = records(run[0], "training")
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    line = lines[-1]
    assert line["tokens"] == 40 * 2 * 2 * 32
    assert line["losses"].keys() == {"lm", "sampling"}
    assert line["loss"] == pytest.approx(line["losses"]["lm"] + 0.001 * line["losses"]["sampling"], rel=1e-4)
    assert line["learning_rate"] == pytest.approx(1e-2 * (1 - 7 / 8))
    assert line["gradient_norm"] > 0
    assert line["tokens_per_second"] > 0
    assert 0 < line["mfu"] < 1
    assert 0.1 < line["peak_memory_gib"] < 64
    assert line["mean_depth"] == pytest.approx((32 + 21 + 10) / 32)
    assert line["capacities"] == pytest.approx([1, 21 / 32, 10 / 32])
    assert line["depth_histogram"] == pytest.approx([0, 11 / 32, 11 / 32, 10 / 32])
    assert len(line["sampling_accuracy"]) == 3
    assert 0 <= line["dead_token_ratio"] < 1
    assert line["max_violation"] >= 0
    assert 0 <= line["router_entropy"] <= math.log(3) + 1e-9


def test_training_flops_are_those_of_the_tokens_that_were_active(run):
    """At constant capacities the count equals the cost of the configuration, from the first line on."""
    config = MorForCausalLM.from_pretrained(run[0] / "final").config
    for line in records(run[0], "training"):
        assert line["flops"] == pytest.approx(training_flops(config, line["tokens"], sequence_length=32), rel=1e-9)


def test_evaluations_name_their_decision_rule(run):
    lines = records(run[0], "evaluation")
    assert [line["step"] for line in lines] == [6, 12, 18, 24, 30, 36, 40]
    for line in lines:
        assert line["decisions"].keys() == {"causal", "top_k"}
    assert lines[-1]["decisions"]["top_k"]["mean_depth"] == pytest.approx((32 + 21 + 10) / 32)


def test_the_final_model_loads_is_calibrated_and_has_its_tokenizer(run):
    output, result, _ = run
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    assert isinstance(model, MorForCausalLM)
    assert model.config.mean_depth == pytest.approx(2.0)
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    ids = tokenizer("the block reads a token", return_tensors="pt").input_ids
    assert model(ids, mean_depth=1.5).logits.isfinite().all()
    trained = checkpoint.read_latest(output / "checkpoints").folder
    saved = MorForCausalLM.from_pretrained(trained).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert result.evaluation["step"] == 40


def test_the_summary_holds_the_last_figures(run):
    output, result, _ = run
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (40, 5120)
    assert summary["training"] == result.training == records(output, "training")[-1]
    assert summary["evaluation"] == result.evaluation == records(output, "evaluation")[-1]
    assert summary["unique_parameters"] == sum(
        p.numel() for p in MorForCausalLM.from_pretrained(output / "final").parameters()
    )


def test_progress_is_told_in_order(run):
    calls = run[2]
    assert calls[0] == ("start", {"steps": 40, "step": 0})
    assert [step for name, step in calls if name == "advance"] == list(range(1, 41))
    assert calls[-1] == ("close", None)


@pytest.mark.parametrize(
    "model",
    [
        {"router": "none"},
        {"router": "none", "num_recursions": 1, "sharing": "none"},
        {"router": "expert_choice", "causal_method": "aux_router"},
        {"router": "threshold_choice"},
        {"router": "token_choice", "balancing": "loss_free"},
        {"router": "token_choice"},
        {"router": "random"},
        {"router": "fixed", "fixed_depths": [1, 3]},
        {"router": "gate"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_every_router_trains(tmp_path, shards, model):
    output = tmp_path / "run"
    result = train(tiny_options(output, shards, model=model, steps=4, log_interval=2), progress=SilentProgress())
    assert result.training["loss"] > 0
    assert math.isfinite(result.evaluation["decisions"]["causal"]["nll"])
    final = MorForCausalLM.from_pretrained(output / "final")
    assert (final.config.mean_depth is None) is (model["router"] not in ("expert_choice", "random"))
    if model["router"] in ("threshold_choice", "token_choice"):
        assert not final.model.recursion.router.calibration_mean_depth.isnan().any()
    if model.get("balancing") == "loss_free":
        assert final.model.recursion.router.load_bias.abs().sum() > 0


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True}, {"log_interval": 5}])
def test_settings_that_change_nothing_in_the_result(tmp_path, shards, training):
    losses = []
    for number, settings in enumerate(({}, training)):
        output = tmp_path / str(number)
        train(tiny_options(output, shards, steps=10, **settings), progress=SilentProgress())
        losses.append(records(output, "evaluation")[-1]["decisions"]["causal"]["nll"])
    assert losses[0] == losses[1]


def test_the_authors_accidental_scale_is_an_option(tmp_path, shards):
    train(tiny_options(tmp_path / "run", shards, steps=2, official_aux_loss_scale=True), progress=SilentProgress())
    line = records(tmp_path / "run", "training")[-1]
    assert line["loss"] == pytest.approx(line["losses"]["lm"] + 2 * 0.001 * line["losses"]["sampling"], rel=1e-5)


def test_evaluation_and_calibration_can_be_left_out(tmp_path, shards):
    options = tiny_options(tmp_path / "run", shards, steps=2, evaluation_tokens=0)
    result = train(options, progress=SilentProgress())
    assert result.evaluation is None
    final = MorForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert not final.model.recursion.router.calibration_mean_depth.isnan().any()
    options = tiny_options(tmp_path / "bare", shards, steps=2, evaluation_tokens=0, calibration_tokens=0)
    train(options, progress=SilentProgress())
    assert MorForCausalLM.from_pretrained(tmp_path / "bare" / "final").config.mean_depth is None


def test_a_configured_budget_becomes_the_final_models_default(tmp_path, shards):
    model = {"router": "token_choice", "mean_depth": 1.5}
    train(tiny_options(tmp_path / "run", shards, model=model, steps=2), progress=SilentProgress())
    assert MorForCausalLM.from_pretrained(tmp_path / "run" / "final").config.mean_depth == 1.5
    with pytest.raises(ValueError, match=r"mean_depth=1\.5 needs a calibration"):
        train(tiny_options(tmp_path / "bare", shards, model=model, calibration_tokens=0), progress=SilentProgress())


def test_training_can_start_from_a_model(run, tmp_path, shards):
    options = tiny_options(tmp_path / "run", shards, model=None, steps=2)
    options = type(options)(
        **{**vars(options), "model": {"router_aux_loss_coef": 0.1}, "initial_model": str(run[0] / "final")}
    )
    result = train(options, progress=SilentProgress())
    assert result.evaluation["decisions"]["causal"]["nll"] < 1.5 * run[1].evaluation["decisions"]["causal"]["nll"]
    assert MorForCausalLM.from_pretrained(tmp_path / "run" / "final").config.router_aux_loss_coef == 0.1


def test_a_model_of_another_shape_is_refused(run, tmp_path, shards):
    options = tiny_options(tmp_path / "run", shards)
    options = type(options)(
        **{**vars(options), "model": {"router": "token_choice"}, "initial_model": str(run[0] / "final")}
    )
    with pytest.raises(ValueError, match=r"weights in .*final do not fit the model"):
        train(options, progress=SilentProgress())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 100}}, "vocab_size=100 is too small for .*shards, whose tokenizer has 257 tokens"),
        ({"model": {"max_position_embeddings": 16}}, "max_position_embeddings=16 is less than sequence_length=32"),
        ({"model": {"hiden_size": 16}}, "did you mean 'hidden_size'"),
        ({"device": "cuda:77"}, "device='cuda:77' cannot be used"),
        ({"precision": "bfloat16"}, "needs a CUDA device"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, shards, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_options(tmp_path / "run", shards, **changes), progress=SilentProgress())
    assert not (tmp_path / "run").exists()


def test_data_must_be_there(tmp_path, shards):
    for path, message in (("", "data.path is not set"), (tmp_path / "none", "none")):
        options = tiny_options(tmp_path / "run", path)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(options, progress=SilentProgress())
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(run, shards):
    with pytest.raises(ValueError, match="already holds a run; resume it, or choose another output"):
        train(tiny_options(run[0], shards), progress=SilentProgress())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, shards, number):
    output = tmp_path / "run"
    progress = At(5, lambda: signal.raise_signal(number))
    result = train(tiny_options(output, shards), progress=progress)
    assert (result.step, result.interrupted, result.model) == (5, True, None)
    assert checkpoint.read_latest(output / "checkpoints").step == 5
    assert not (output / "final").exists()
    assert train(tiny_options(output, shards), resume=True, progress=SilentProgress()).step == 12


def poison(router_weight, value):
    """An action that puts `value` into a weight of the model under training."""
    with torch.no_grad():
        router_weight.fill_(value)


@pytest.fixture
def trained_models(monkeypatch):
    """The models that `train` builds, so that a test can reach into them."""
    models = []
    original = MorForCausalLM.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        models.append(self)

    monkeypatch.setattr(MorForCausalLM, "__init__", init)
    return models


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_its_place(tmp_path, shards, trained_models):
    output = tmp_path / "run"
    progress = At(7, lambda: poison(trained_models[0].lm_head.weight, float("nan")))
    with pytest.raises(NonFiniteLossError, match=r"is nan at step 8, whose data begins at .*; last checkpoint: step 4"):
        train(tiny_options(output, shards, checkpoint_interval=4, log_interval=3), progress=progress)
    failure = json.loads((output / "failure.json").read_text())
    assert failure["step"] == 8
    assert failure["last_checkpoint"] == 4
    assert failure["values"]["loss"] == "nan"
    assert failure["data_position"] != {}
    assert checkpoint.read_latest(output / "checkpoints").step == 4
    assert [line["step"] for line in records(output, "training")] == [3, 6]
    assert train(tiny_options(output, shards), resume=True, progress=SilentProgress()).step == 12
    assert not (output / "failure.json").exists()


def test_a_run_that_is_told_to_stop_saves_no_weights_that_are_not_numbers(tmp_path, shards, trained_models):
    """Step 5 is neither logged nor saved, so that only the leaving looks at it."""
    output = tmp_path / "run"

    def leave():
        poison(trained_models[0].lm_head.weight, float("nan"))
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(NonFiniteLossError, match=r"is nan at step 5, .*; last checkpoint: step 4"):
        train(tiny_options(output, shards), progress=At(5, leave))
    assert checkpoint.read_latest(output / "checkpoints").step == 4


def test_weights_that_are_not_numbers_are_not_saved(tmp_path, shards, monkeypatch):
    """An update can break the weights although the loss and gradient before it were finite."""
    options = tiny_options(tmp_path / "run", shards, steps=4, checkpoint_interval=1)
    optimizer = type(options.optimizer)(learning_rate=1e38, weight_decay=1e38)
    with pytest.raises(NonFiniteLossError, match=r"weight is (inf|nan) at step 2"):
        train(type(options)(**{**vars(options), "optimizer": optimizer}), progress=SilentProgress())
    assert checkpoint.read_latest(tmp_path / "run" / "checkpoints").step == 1


def test_a_full_disk_at_a_checkpoint_is_a_clear_error(tmp_path, shards, monkeypatch):
    output, original = tmp_path / "run", MorForCausalLM.save_pretrained

    def save(self, folder, **kwargs):
        original(self, folder, **kwargs)
        if "step-00000008" in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(MorForCausalLM, "save_pretrained", save)
    with pytest.raises(CheckpointError, match=r"step-00000008: .*the disk is full.*; .*step-00000004 is still intact"):
        train(tiny_options(output, shards), progress=SilentProgress())
    monkeypatch.undo()
    assert checkpoint.read_latest(output / "checkpoints").step == 4
    assert train(tiny_options(output, shards), resume=True, progress=SilentProgress()).step == 12


def test_damaged_shards_are_noticed(tmp_path, shards):
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    file = next(copy.glob("train-00000.bin"))
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="train-00000"):
        train(tiny_options(tmp_path / "run", copy), progress=SilentProgress())
