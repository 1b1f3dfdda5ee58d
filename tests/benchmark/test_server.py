"""What the server is measured with: clients that read it right, and an engine that makes tokens up."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra mor[serve]")

from mor.benchmark.server_client import Answer, Clients, ask, post
from mor.benchmark.server_model import text_tokenizer
from mor.benchmark.server_throughput import Load, share, summarise
from mor.benchmark.stub_engine import StubSource
from mor.engine.params import SamplingParams
from tests.serve.serving import Running, running


@pytest.fixture(scope="module")
def server() -> Running:
    with running() as server:
        yield server


def load() -> Load:
    return Load.random(requests=5, prompt=4, tokens=8, vocab_size=200, streams=3)


def test_clients_get_what_they_ask_for(server: Running) -> None:
    answers = asyncio.run(ask(server.url, load().bodies(), 3))
    assert sorted(answer.usage["completion_tokens"] for answer in answers) == sorted(load().lengths)
    for answer in answers:
        assert answer.status == 200 and answer.times[0] > 0 and all(a <= b for a, b in pairwise(answer.times))
    found = summarise(answers, server_cpu=1.0, engine_cpu=2.0)
    assert found.server_cpu == pytest.approx(1e6 / load().num_tokens) and found.tokens_per_second > 0


def test_clients_in_processes_of_their_own(server: Running) -> None:
    with Clients(2) as clients:
        for _ in range(2):
            answers = clients.ask(server.url, load().bodies(), streams=3)
            assert sum(answer.usage["completion_tokens"] for answer in answers) == load().num_tokens


def test_a_refusal_is_no_stream(server: Running) -> None:
    answer = asyncio.run(post(server.url, "/v1/completions", b"{"))
    assert answer.status == 400 and b"invalid_json" in answer.body
    with pytest.raises(ValueError, match="ended with"):
        _ = Answer(body=b"data: {}\n\n").usage


def test_lengths_differ_around_their_mean() -> None:
    many = Load.random(requests=400, prompt=1, tokens=100, vocab_size=9, streams=1)
    assert min(many.lengths) >= 50 and max(many.lengths) <= 150
    assert many.num_tokens / 400 == pytest.approx(100, rel=0.05)
    assert share([3.0, 1.0, 2.0], 0.5) == 2.0 and share([1.0, 2.0], 1.0) == 2.0


def test_an_engine_that_makes_tokens_up() -> None:
    engine = StubSource(piece=5, beat=0.0, max_requests=2).open()
    for name in "abc":
        engine.add_request(name, [1, 2], SamplingParams(max_tokens=12, ignore_eos=True))
    counts = {"a": 0, "b": 0, "c": 0}
    first = engine.step()
    assert [(output.id, len(output.token_ids)) for output in first] == [("a", 5), ("b", 5)]  # the third waits
    while engine.has_unfinished:
        for output in engine.step():
            counts[output.id] += len(output.token_ids)
            assert output.text
    assert counts == {"a": 7, "b": 7, "c": 12}


def test_every_token_has_text() -> None:
    tokenizer = text_tokenizer(300)
    assert len(tokenizer) == 300 and tokenizer.eos_token_id == 0
    assert tokenizer.decode([257, 299]) == " w0 w42"
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(["a", "b"])
