import json

import pytest
from transformers import AutoConfig

from mor.model.configuration_mor import MorConfig
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_recursion=3), "unknown configuration key 'num_recursion'; did you mean 'num_recursions'"),
        (dict(router="expert"), "router='expert' is unknown; choose one of 'none', 'expert_choice'"),
        (dict(kv_cache="share"), "kv_cache='share' is unknown"),
        (dict(router="expert_choice", capacities=[1.0, 0.3, 0.5]), "must not rise"),
        (dict(router="expert_choice", capacities=[1.0, 0.5]), "one entry per recursion: 3"),
        (dict(router="expert_choice", capacities=[1.0, 0.5, 0.0]), r"must lie in \(0, 1\]"),
        (dict(router="expert_choice", router_activation="softmax"), "router_activation='softmax'"),
        (dict(router="token_choice", router_activation="tanh"), "router_activation='tanh'"),
        (dict(router="expert_choice", sharing="sequence", num_recursions=2), "needs whole-block recursions"),
        (dict(router="fixed", fixed_depths=[1, 4]), "depth 4 must lie between 1 and 3"),
        (dict(router="fixed", fixed_depths=[]), "needs fixed_depths"),
        (dict(num_attention_heads=4, num_key_value_heads=3), "not a multiple of num_key_value_heads=3"),
        (dict(threshold_decay=1.0), r"threshold_decay=1.0 must lie in \[0, 1\)"),
        (dict(router="threshold_choice", causal_method="aux_router"), "'aux_router' has nothing to imitate"),
        (dict(router="expert_choice", mean_depth=4.0), "mean_depth=4.0 must lie between 1 and num_recursions=3"),
        (dict(num_hidden_layers=0), "must be at least 1"),
        (dict(head_dim=7), "must be even"),
        (dict(router_temperature=0.0), "must be positive"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_round_trip_through_json(tmp_path):
    config = tiny_config(router="expert_choice", kv_cache="hybrid", capacities=[1, 0.5, 0.25], mean_depth=1.5)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mor" and saved["capacities"] == [1.0, 0.5, 0.25]


def test_a_misspelt_key_in_a_saved_file_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"capacitys": [1.0]}))
    with pytest.raises(ValueError, match="did you mean 'capacities'"):
        AutoConfig.from_pretrained(tmp_path)


def test_defaults_follow_the_router():
    expert = tiny_config(router="expert_choice")
    assert (expert.router_activation, expert.router_alpha) == ("sigmoid", 0.1)
    assert expert.capacities == [1.0, 2 / 3, 1 / 3]
    threshold = tiny_config(router="threshold_choice")
    assert (threshold.router_activation, threshold.router_alpha) == ("sigmoid", 0.1)
    assert threshold.capacities == expert.capacities
    token = tiny_config(router="token_choice")
    assert (token.router_activation, token.router_alpha, token.capacities) == ("softmax", 1.0, None)
    assert tiny_config(router="gate").fixed_depths == [3]
    assert MorConfig().router == "none"
