import pytest
import torch
from torch._dynamo.utils import counters

from mor.train.compile import NUMBERS_OF_TOKENS, compile_layers, forget_compiled
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    forget_compiled()


@pytest.mark.parametrize(
    ("settings", "pads", "graphs", "forgets"),
    [
        ({"router": "expert_choice"}, False, NUMBERS_OF_TOKENS // 2, False),
        ({"router": "expert_choice"}, False, NUMBERS_OF_TOKENS // 2 + 1, True),
        ({"router": "token_choice"}, False, 1, True),
        ({"router": "token_choice"}, True, 1, False),
        ({"router": "expert_choice", "capacity_warmup_steps": 3}, False, 1, True),
    ],
)
def test_compiled_code_goes_when_it_would_not_serve_the_next_run(monkeypatch, settings, pads, graphs, forgets):
    model, resets = tiny_model(**settings), []
    model.model.recursion.router.pads_sets = pads
    compile_layers(model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setitem(counters["stats"], "unique_graphs", graphs)
    forget_compiled()
    assert bool(resets) == forgets
    assert counters["stats"]["unique_graphs"] == (0 if forgets else graphs)
    forget_compiled()
    assert len(resets) == forgets  # once is enough


@pytest.mark.parametrize(
    ("router", "warmup", "pads", "dynamic"),
    [
        ("expert_choice", 0, False, False),
        ("expert_choice", 3, False, True),
        ("token_choice", 0, False, True),
        ("token_choice", 0, True, False),
        ("threshold_choice", 3, True, False),
    ],
)
def test_code_is_for_any_number_of_tokens_where_it_varies(monkeypatch, router, warmup, pads, dynamic):
    model, asked = tiny_model(router=router, capacity_warmup_steps=warmup), set()
    model.model.recursion.router.pads_sets = pads
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.add(options["dynamic"]) or function)
    compile_layers(model)
    assert asked == {dynamic}
