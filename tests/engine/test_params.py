"""SamplingParams refuse what makes no sense, and say what would."""

from __future__ import annotations

import dataclasses

import pytest

from mor.engine.params import SamplingParams
from tests.engine.workload import engine_of
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 2.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 300, "at most max_tokens=256"),
        ("temperature", -0.1, "0 (greedy) or more"),
        ("temperature", float("nan"), "0 (greedy) or more"),
        ("temperature", float("inf"), "0 (greedy) or more"),
        ("temperature", "1", "a number"),
        ("temperature", None, "a number"),
        ("temperature", True, "a number"),
        ("temperature", 10**400, "a number"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.5, "at most 1"),
        ("top_p", "0.9", "at most 1"),
        ("min_p", -0.5, "between 0"),
        ("min_p", 1.01, "and 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", -3.0, "between -2 and 2"),
        ("frequency_penalty", [0.5], "between -2 and 2"),
        ("seed", -1, "or None"),
        ("n", 0, "at least 1"),
        ("n", 2**70, "at most 65536"),
        ("stop", ("a", ""), "not empty"),
        ("stop", (3,), "strings"),
        ("stop", None, "strings"),
        ("stop", 3, "strings"),
        ("stop_token_ids", (-1,), "0 or more"),
        ("stop_token_ids", ("a",), "token ids"),
        ("stop_token_ids", 3, "token ids"),
        ("ignore_eos", "no", "True or False"),
        ("logprobs", -1, "at least 0, or None"),
        ("prompt_logprobs", -1, "at least 0, or None"),
        ("prompt_logprobs", True, "at least 0, or None"),
        ("mean_depth", 0.5, "between 1"),
        ("mean_depth", float("nan"), "between 1"),
        ("mean_depth", "2", "between 1"),
        ("max_recursions", 0, "at least 1, or None"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(field: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}=") as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value) and right in str(error.value)


def test_several_samples_of_a_greedy_request_are_refused() -> None:
    with pytest.raises(ValueError, match="n=2 with temperature=0"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2).n == 2


def test_the_edges_of_every_range_are_accepted() -> None:
    low = dict(max_tokens=1, min_tokens=0, temperature=0.0, top_k=0, top_p=1e-9, min_p=0.0, repetition_penalty=1e-9)
    high = dict(presence_penalty=-2, frequency_penalty=2, seed=0, logprobs=0, mean_depth=1, max_recursions=1)
    for edges in (
        low | high,
        dict(max_tokens=0, prompt_logprobs=0),
        dict(max_tokens=5, min_tokens=5, top_p=1.0, min_p=1.0),
    ):
        params = SamplingParams(**edges)
        assert {name: getattr(params, name) for name in edges} == edges


def test_stops_become_tuples() -> None:
    params = SamplingParams(stop="\n\n", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("\n\n",) and params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert hash(params) == hash(dataclasses.replace(params))


def test_a_budget_is_what_decides_depths() -> None:
    assert SamplingParams(mean_depth=1.5, temperature=0).budget == (1.5, None)
    assert SamplingParams(max_recursions=2, seed=3).budget == SamplingParams(max_recursions=2).budget == (None, 2)
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams().is_greedy


def test_params_of_another_kind_are_refused() -> None:
    for params in ({"max_tokens": 3}, 3, [{"max_tokens": 3}]):
        with pytest.raises(ValueError, match=r"^params=.*must be SamplingParams"):
            engine_of(tiny_model()).generate([[1, 2]], params, progress=False)  # type: ignore[arg-type]
