import os

import pytest
import torch

from mor.data.shards import TokenShards
from mor.model.modeling_mor import MorForCausalLM
from mor.train.options import RunOptions
from mor.train.setup import build_run, build_validator, default_budget, load_model, model_config, open_shards
from tests.tiny import tiny_model
from tests.train.tiny_run import make_shards, tiny_options


def test_the_data_decides_what_the_model_options_leave_open(tmp_path, shards):
    options = tiny_options(tmp_path, shards)
    config = model_config(options, open_shards(options, "train"))
    assert (config.vocab_size, config.eos_token_id, config.max_position_embeddings) == (257, 256, 32)
    options = tiny_options(
        tmp_path, shards, model={"vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 1}
    )
    config = model_config(options, open_shards(options, "train"))
    assert (config.vocab_size, config.eos_token_id, config.max_position_embeddings) == (320, 1, 64)


def test_a_process_reads_shards_through_once_unless_they_change(tmp_path, monkeypatch):
    options, read, verify = tiny_options(tmp_path, make_shards(tmp_path / "shards")), [], TokenShards.verify

    def counted(self):
        read.append(self.split)
        verify(self)

    monkeypatch.setattr(TokenShards, "verify", counted)
    for _ in range(2):
        for split in ("train", "validation"):
            open_shards(options, split)
    assert read == ["train", "validation"]
    file = tmp_path / "shards" / "train-00000.bin"
    data, before = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    data[0] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before + 1, before + 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            open_shards(options, "train")
    assert read[2:] == ["train", "train"]


def test_the_accidental_scale_multiplies_the_coefficient(tmp_path, shards):
    options = tiny_options(tmp_path, shards, gradient_accumulation_steps=16, official_aux_loss_scale=True)
    assert model_config(options, open_shards(options, "train")).router_aux_loss_coef == pytest.approx(0.016)


def test_the_same_seed_gives_the_same_model_and_data(tmp_path, shards):
    one, other = (build_run(tiny_options(tmp_path, shards))[0] for _ in range(2))
    changed = build_run(tiny_options(tmp_path, shards, seed=1))[0]
    for a, b in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(one.model.lm_head.weight, changed.model.lm_head.weight)
    first = next(one.loader).input_ids
    assert torch.equal(first, next(other.loader).input_ids)
    assert not torch.equal(first, next(changed.loader).input_ids)


def test_loaded_weights_stand_where_new_ones_would_and_stay_tied(tmp_path, shards):
    tiny_model(router="expert_choice", vocab_size=257).save_pretrained(tmp_path / "model")
    options = RunOptions(initial_model=str(tmp_path / "model"), data=tiny_options(tmp_path, shards).data)
    model = load_model(options, MorForCausalLM.from_pretrained(tmp_path / "model").config, None)
    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_run_from_a_model_starts_the_routers_warm_ups_anew(tmp_path, shards):
    source = tiny_model(router="expert_choice", vocab_size=257, capacity_warmup_steps=10).train()
    ids = torch.ones(1, 8, dtype=torch.int64)
    source(ids)
    assert int(source.model.recursion.router.training_forwards) == 1
    source.save_pretrained(tmp_path / "model")
    options = RunOptions(initial_model=str(tmp_path / "model"), data=tiny_options(tmp_path, shards).data)
    model = load_model(options, source.config, None).train()
    assert int(model.model.recursion.router.training_forwards) == 0
    model(ids)
    assert int(model.model.recursion.router.training_forwards) == 1


def test_calibration_rows_lie_at_equal_distances_over_the_training_split(tmp_path, shards):
    """Neighbours are of one document, and alike. One row at least."""
    train = open_shards(tiny_options(tmp_path, shards), "train")
    for tokens, count in ((130, 4), (1, 1)):
        options = tiny_options(tmp_path, shards, calibration_tokens=tokens)
        rows = torch.cat(list(build_validator(options, train, torch.float32)._calibration_rows))
        available = train.num_tokens // 32
        places = [number * available // count * 32 for number in range(count)]
        assert rows.tolist() == [train.read(place, place + 32).tolist() for place in places]
    assert not build_validator(tiny_options(tmp_path, shards, calibration_tokens=0), train, torch.float32).calibrates


@pytest.mark.parametrize("evaluation_tokens", [0, 64])
def test_validation_masks_documents_when_training_does(tmp_path, shards, evaluation_tokens):
    for masking, expected in ((True, 256), (False, None)):
        settings = {"data": {"document_masking": masking}, "evaluation_tokens": evaluation_tokens}
        options = tiny_options(tmp_path, shards, **settings)
        train = open_shards(options, "train")
        assert build_validator(options, train, torch.float32)._end_of_text == expected


@pytest.mark.parametrize(
    ("router", "expected"),
    [("expert_choice", 2.0), ("random", 2.0), ("threshold_choice", None), ("token_choice", None), ("gate", None)],
)
def test_the_default_budget(tmp_path, shards, router, expected):
    options = tiny_options(tmp_path, shards)
    options = type(options)(**{**vars(options), "model": {"router": router}})
    budget = default_budget(options, tiny_model(router=router))
    assert budget == (None if expected is None else pytest.approx(expected))
