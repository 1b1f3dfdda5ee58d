import json
import os
import shutil

import pytest
import torch

from mor.files import TEMPORARY
from mor.model.modeling_mor import MorForCausalLM
from mor.train import checkpoint
from mor.train.checkpoint import CheckpointError
from tests.tiny import tiny_model

TENSORS = {"moments/a": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0), "state": torch.tensor([1, 255]).byte()}
VALUES = {"tokens": 12, "nested": {"list": [1, None, "text"]}, "third": 1 / 3}


@pytest.fixture(scope="module")
def model():
    return tiny_model(router="expert_choice")


def save(folder, step, model, keep=2, tensors=TENSORS):
    return checkpoint.save(folder, step, model=model, tensors=tensors, values=VALUES | {"at": step}, keep=keep)


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(folder)]


def test_what_was_saved_is_read(tmp_path, model):
    path = save(tmp_path / "checkpoints", 100, model)
    assert path.name == "step-00000100"
    found = checkpoint.read_latest(tmp_path / "checkpoints")
    assert found.folder == path
    assert found.step == 100
    assert found.values == VALUES | {"at": 100}
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    loaded = MorForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].nan_to_num(9), tensor.nan_to_num(9)), name
    assert not any(path.rglob("*.bin"))


def test_the_newest_are_kept(tmp_path, model):
    for step in (1, 2, 30, 4000):
        save(tmp_path, step, model, keep=2)
    assert steps(tmp_path) == [30, 4000]
    assert sorted(os.listdir(tmp_path)) == ["step-00000030", "step-00004000"]
    save(tmp_path, 31, model, keep=1)
    assert steps(tmp_path) == [31, 4000]


def test_a_step_is_written_again_in_place(tmp_path, model):
    save(tmp_path, 5, model)
    save(tmp_path, 5, model, tensors={"only": torch.ones(1)})
    assert checkpoint.read_latest(tmp_path).tensors.keys() == {"only"}
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_there_may_be_none(tmp_path):
    assert checkpoint.read_latest(tmp_path / "nowhere") is None


def truncate(path):
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", truncate, "is truncated"),
        ("model.safetensors", flip, "is damaged: its SHA-256"),
        ("config.json", os.unlink, "is missing"),
        ("training_state.safetensors", truncate, "is truncated"),
        ("training_state.safetensors", flip, "is damaged: its SHA-256"),
        ("training_state.json", truncate, "is damaged"),
        ("training_state.json", os.unlink, "cannot be read: No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, model, name, harm, message):
    save(tmp_path, 1, model)
    damaged = save(tmp_path, 2, model)
    harm(damaged / name)
    with pytest.raises(CheckpointError, match=rf"step-00000002/{name} {message}"):
        checkpoint.read(damaged)
    with pytest.warns(UserWarning, match=rf"step-00000002/{name} {message}.*; going back to the checkpoint before it"):
        assert checkpoint.read_latest(tmp_path).step == 1
    shutil.rmtree(tmp_path / "step-00000001")
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(CheckpointError, match=rf"no checkpoint in .* can be used; the newest: .*{name}"),
    ):
        checkpoint.read_latest(tmp_path)


def test_a_changed_value_is_noticed(tmp_path, model):
    path = save(tmp_path, 2, model) / checkpoint.VALUES
    path.write_text(path.read_text().replace('"tokens": 12', '"tokens": 13'))
    with pytest.raises(CheckpointError, match="its content does not match its digest"):
        checkpoint.read(path.parent)


def test_a_later_format_is_refused_without_falling_back(tmp_path, model, monkeypatch):
    save(tmp_path, 1, model)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, 2, model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 2; this version reads format 1"):
        checkpoint.read_latest(tmp_path)


@pytest.mark.parametrize("size", [100, 10_000, 150_000])
def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, model, small_disk, size):
    """The limits fall into config.json, model.safetensors and training_state.safetensors."""
    save(tmp_path, 1, model, tensors={"large": torch.zeros(50_000)})
    assert (tmp_path / "step-00000001" / "model.safetensors").stat().st_size < 150_000
    small_disk(size)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*step-00000002: .*step-00000001 is still"):
        save(tmp_path, 2, model, tensors={"large": torch.zeros(50_000)})
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert checkpoint.read_latest(tmp_path).step == 1


def test_the_first_checkpoint_may_fail_too(tmp_path, model, small_disk):
    small_disk(100)
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        save(tmp_path, 1, model)


def test_what_a_killed_process_left_is_removed(tmp_path, model):
    (tmp_path / f"{TEMPORARY}step-00000007").mkdir()
    (tmp_path / "step-old").mkdir()
    save(tmp_path, 8, model)
    assert sorted(os.listdir(tmp_path)) == ["step-00000008", "step-old"]


def test_numbers_that_json_has_not_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, 1, model=model, tensors={}, values={"loss": float("nan")}, keep=1)
    assert os.listdir(tmp_path) == []


def test_the_record_is_plain_json(tmp_path, model):
    record = json.loads((save(tmp_path, 3, model) / checkpoint.VALUES).read_text())
    assert record["step"] == 3
    assert {"config.json", "model.safetensors", "training_state.safetensors"} <= record["files"].keys()
