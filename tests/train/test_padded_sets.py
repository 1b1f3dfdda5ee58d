"""Steps with padded sets are the steps with sets of just the tokens, and are chosen where they pay."""

import pytest
import torch

from mor.model import token_set
from mor.train import setup, step_graph
from mor.train.options import TrainingOptions
from mor.train.padded_sets import has_padded_sets, launch_seconds, padded_seconds, should_pad
from mor.train.ranks import Ranks
from mor.train.setup import build_run
from mor.train.step import optimizer_step
from mor.train.step_graph import choose_sets
from tests.tiny import tiny_config, tiny_model
from tests.train.alike import assert_alike
from tests.train.tiny_run import tiny_options

STEPS, LENGTH = 4, 96
H200 = 790e12


def run(folder, shards, *, pads_sets, **settings):
    """A run after a few steps."""
    settings = dict(evaluation_tokens=0, calibration_tokens=0, sequence_length=LENGTH, steps=STEPS) | settings
    state, _ = build_run(tiny_options(folder, shards, **settings))
    state.model.train()
    state.model.model.recursion.router.pads_sets = pads_sets
    for _ in range(STEPS):
        optimizer_step(state, 3e-3)
    return state


@pytest.fixture
def sizes(monkeypatch):
    """The places of the sets that are made from decisions."""
    made, make = [], token_set.TokenSet.from_mask.__func__

    def noting(kind, member_BT, size=None):
        found = make(kind, member_BT, size)
        made.append(found.index_BK.shape[1])
        return found

    monkeypatch.setattr(token_set.TokenSet, "from_mask", classmethod(noting))
    monkeypatch.setattr(token_set, "_ROUNDING", 8)
    return made


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
@pytest.mark.parametrize(
    "router",
    [
        {"router": "token_choice", "router_z_loss_coef": 0.1},
        {"router": "token_choice", "balancing": "loss_free", "balancing_update_rate": 0.05},
        {"router": "threshold_choice", "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1},
    ],
    ids=["token", "token-loss-free", "threshold"],
)
def test_padding_changes_no_number(tmp_path, shards, sizes, router, kv_cache, documents):
    """Losses, norms, depths, weights, thresholds and biases, with sets that are shorter than rows."""
    runs, made = [], []
    for pads_sets in (False, True):
        settings = dict(model=router | {"kv_cache": kv_cache}, data={"document_masking": documents})
        runs.append(run(tmp_path, shards, pads_sets=pads_sets, **settings))
        made.append(set(sizes))
        sizes.clear()
    assert len(made[0] - {LENGTH}) > 1 and made[1] == {LENGTH}
    assert_alike(*runs, 1e-5)
    assert sum(share > 0.02 for share in runs[0].window.summary()["depth_histogram"]) >= 2


def test_padding_is_for_training_alone(sizes):
    model = tiny_model(router="token_choice")
    model.model.recursion.router.pads_sets = True
    ids = torch.arange(1, 25).expand(2, 24)
    model(ids, use_cache=False)
    assert min(sizes) < 24
    sizes.clear()
    model.train()(ids)
    assert set(sizes) == {24}


def study(**changes):
    """The studies' model and batch."""
    model = dict(vocab_size=8192, hidden_size=192, intermediate_size=512, num_hidden_layers=14, num_attention_heads=6)
    model |= dict(num_key_value_heads=3, num_recursions=3, sharing="middle_cycle", router="token_choice")
    return TrainingOptions(micro_batch_size=32, sequence_length=512), tiny_config(**(model | changes))


LARGE = dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15)


def test_padding_is_chosen_where_launching_takes_longer_than_computing():
    training, config = study()
    assert padded_seconds(training, config, H200) == pytest.approx(0.0043, rel=0.02)
    assert launch_seconds(config) == pytest.approx(0.028)
    assert should_pad(training, config, lambda: H200)
    assert should_pad(*study(router="threshold_choice"), lambda: H200)
    assert not should_pad(training, config, lambda: H200 / 10)
    assert not should_pad(*study(**LARGE, num_key_value_heads=5), lambda: H200)


def test_a_word_decides_and_only_routers_that_vary_are_asked():
    def unmeasured():
        raise AssertionError

    _, large = study(**LARGE, num_key_value_heads=5)
    assert should_pad(TrainingOptions(cuda_graph=True), large, unmeasured)
    assert not should_pad(TrainingOptions(cuda_graph=False), study()[1], unmeasured)
    assert not should_pad(TrainingOptions(), tiny_config(router="expert_choice"), unmeasured)


def test_a_run_that_asks_for_a_graph_has_its_layers_compiled_for_padded_sets(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(step_graph, "obstacle", lambda *given: None)
    padded = []
    monkeypatch.setattr(setup, "compile_layers", lambda model: padded.append(has_padded_sets(model)))
    for asked in (True, False):
        options = tiny_options(tmp_path, shards, model={"router": "token_choice"}, compile=True, cuda_graph=asked)
        build_run(options)
    assert padded == [True, False]


def test_nothing_is_padded_without_a_graph():
    for device, ranks, pads in (("cpu", 1, False), ("cuda", 2, False), ("cuda", 1, True)):
        model = tiny_model(router="token_choice")
        choose_sets(TrainingOptions(cuda_graph=True), model, torch.device(device), torch.float32, Ranks(size=ranks))
        assert model.model.recursion.router.pads_sets == has_padded_sets(model) == pads
