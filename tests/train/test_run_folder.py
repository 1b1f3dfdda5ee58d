import json

import pytest

from mor.config import to_dict
from mor.files import TEMPORARY
from mor.train.options import DataOptions, RunOptions, TrainingOptions
from mor.train.run_folder import RunFolder, check_same_options

OPTIONS = RunOptions(model={"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}, data=DataOptions(path="shards"))
STORED = json.loads(json.dumps(to_dict(OPTIONS)))


def test_claiming_writes_the_options_and_clears_what_failures_left(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.refuse_occupied()
    folder.claim(OPTIONS)
    folder.failure.touch()
    (folder.path / f"{TEMPORARY}summary.json").touch()
    folder.claim(OPTIONS)
    assert [path.name for path in folder.path.iterdir()] == ["options.json"]
    assert json.loads(folder.options.read_text()) == STORED
    with pytest.raises(ValueError, match="run already holds a run; resume it, or choose another output"):
        folder.refuse_occupied()


def test_the_same_options_pass_and_some_may_change():
    assert check_same_options(STORED, OPTIONS) is None
    moved = RunOptions(
        output="elsewhere",
        model=OPTIONS.model,
        data=DataOptions(path="moved", verify=False),
        training=TrainingOptions(checkpoint_interval=7, keep_checkpoints=9, device="cpu", stop_at_spike=True),
    )
    assert check_same_options(STORED, moved) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": TrainingOptions(steps=2000)}, "'training.steps' was 1000 and is now 2000"),
        ({"model": {"hidden_size": 32, "rope_parameters": {"rope_theta": 1e4}}}, "'model.hidden_size' was 64"),
        ({"model": {"hidden_size": 64}}, "'model.rope_parameters.rope_theta' was 10000.0 and is now None"),
        ({"initial_model": "other"}, "'initial_model' was None and is now 'other'"),
    ],
)
def test_another_option_is_named(change, message):
    values = {"model": OPTIONS.model, "data": OPTIONS.data} | change
    with pytest.raises(ValueError, match=f"cannot resume: option {message}"):
        check_same_options(STORED, RunOptions(**values))
