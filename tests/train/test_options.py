import pytest

from mor.config import apply_overrides, from_dict, to_dict
from mor.train.options import DataOptions, OptimizerOptions, RunOptions, ScheduleOptions, TrainingOptions


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainingOptions, {"steps": 0}, "steps=0 must be at least 1"),
        (TrainingOptions, {"micro_batch_size": -2}, "micro_batch_size=-2"),
        (TrainingOptions, {"sequence_length": 1}, "sequence_length=1 must be at least 2"),
        (TrainingOptions, {"keep_checkpoints": 0}, "keep_checkpoints=0"),
        (TrainingOptions, {"precision": "float16"}, "'float16' is unknown; choose one of 'auto'"),
        (OptimizerOptions, {"beta2": 1.0}, r"beta2=1.0 must lie in \[0, 1\)"),
        (OptimizerOptions, {"learning_rate": float("nan")}, "learning_rate=nan"),
        (OptimizerOptions, {"max_gradient_norm": 0.0}, "None turns clipping off"),
        (ScheduleOptions, {"kind": "linear"}, "choose one of 'trapezoid', 'cosine'"),
        (ScheduleOptions, {"minimum_ratio": 1.5}, "minimum_ratio=1.5"),
        (ScheduleOptions, {"warmup_steps": -1}, "warmup_steps=-1"),
        (RunOptions, {"output": ""}, "must name the run folder"),
    ],
)
def test_impossible_values_are_refused_with_the_value(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_phases_must_fit_into_the_run():
    with pytest.raises(ValueError, match="warmup_steps=90 and decay_steps=20 do not fit into steps=100"):
        RunOptions(training=TrainingOptions(steps=100), schedule=ScheduleOptions(warmup_steps=90))
    with pytest.raises(ValueError, match="warmup_steps=101 must be at most steps=100"):
        RunOptions(training=TrainingOptions(steps=100), schedule=ScheduleOptions(kind="cosine", warmup_steps=101))


def test_options_survive_a_round_trip_and_take_overrides():
    options = RunOptions(model={"hidden_size": 64}, data=DataOptions(path="shards"))
    assert from_dict(RunOptions, to_dict(options)) == options
    changed = apply_overrides(
        options, ["--training.steps=7", "--optimizer.max_gradient_norm=none", "--model.router=gate"]
    )
    assert changed.training.steps == 7
    assert changed.optimizer.max_gradient_norm is None
    assert changed.model == {"hidden_size": 64, "router": "gate"}
    with pytest.raises(ValueError, match=r"did you mean 'training\.micro_batch_size'"):
        apply_overrides(options, ["--training.micro_batchsize=7"])


def test_tokens_per_step_counts_all_micro_batches():
    options = TrainingOptions(micro_batch_size=16, gradient_accumulation_steps=64, sequence_length=2048)
    assert options.tokens_per_step == 2_097_152
