import pytest
import torch

from mor.model.configuration_mor import MorConfig
from mor.train.window import Window
from tests.train.test_metrics import DEPTHS_BT, trace

CPU = torch.device("cpu")


def config(router="expert_choice", **values):
    base = {
        "num_hidden_layers": 3,
        "num_recursions": 3,
        "sharing": "cycle",
        "hidden_size": 16,
        "num_attention_heads": 2,
    }
    return MorConfig(**base, router=router, **values)


def filled(window):
    window.add_step({"loss": torch.tensor(2.0), "gradient_norm": torch.tensor(1.0)})
    window.add_forward(DEPTHS_BT, (trace([[1.0, -1.0]], [[True, True]]), trace([[-1.0]], [[False]])))
    window.add_step({"loss": torch.tensor(4.0), "gradient_norm": torch.tensor(2.0)})
    window.add_forward(torch.full((2, 4), 3), (trace([[1.0, 1.0]], [[True, True]]), trace([[-1.0]], [[True]])))
    return window


def test_summary_covers_all_steps_of_the_window():
    summary = filled(Window(config())).summary()
    assert summary["loss"] == 3.0
    assert summary["gradient_norm"] == 1.5
    assert summary["mean_depth"] == (15 + 24) / 16
    assert summary["depth_histogram"] == [0, 4 / 16, 1 / 16, 11 / 16]
    assert summary["capacities"] == [1.0, 12 / 16, 11 / 16]
    assert summary["dead_token_ratio"] == 0.0
    assert summary["sampling_accuracy"] == [0.75, 0.5]
    assert summary["max_violation"] == pytest.approx(11 / 16 * 3 - 1)


def test_state_survives_a_round_trip_in_the_middle_of_a_window():
    window, copy = filled(Window(config())), Window(config())
    copy.load_state_dict({name: tensor.clone() for name, tensor in window.state_dict().items()}, CPU)
    assert copy.summary() == window.summary()
    for each in (window, copy):
        each.add_step({"loss": torch.tensor(0.1), "gradient_norm": torch.tensor(0.2)})
        each.add_forward(DEPTHS_BT, (trace([[1.0, -1.0]], [[True, True]]), trace([[-1.0]], [[False]])))
    assert copy.summary() == window.summary()
    window.clear()
    assert window.state_dict() == {}
    assert window.values() == {}


def test_only_what_a_router_has_is_reported():
    unrouted = Window(config("none"))
    unrouted.add_step({"loss": torch.tensor(1.0)})
    unrouted.add_forward(torch.full((1, 4), 3), ())
    assert unrouted.summary().keys() == {"loss", "mean_depth", "depth_histogram", "capacities"}
    assert "sampling_accuracy" not in filled(Window(config("random"))).summary()
