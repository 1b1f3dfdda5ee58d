"""Small parts: the wire, names of tokens, options, metrics."""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.serve.messages import Abort, Load, ModelFacts, News, Stop
from mor.serve.metrics import Metrics, TokenRate
from mor.serve.options import ServeOptions
from mor.serve.vocabulary import Vocabulary
from mor.serve.wire import Wire, WireProtocol, pack


def test_messages_arrive_whole_however_they_are_cut() -> None:
    heard: list[Any] = []
    protocol = WireProtocol(hear=heard.append, lost=lambda: None)
    messages = [Abort(id="a"), Stop(), Abort(id="b" * 1000)]
    data = b"".join(map(pack, messages))
    for size in (1, 3, 500, len(data)):
        heard.clear()
        for start in range(0, len(data), size):
            protocol.data_received(data[start : start + size])
        assert heard == messages


def test_the_two_ends_of_a_wire() -> None:
    ours, theirs = socket.socketpair()
    wire, heard, lost = Wire(theirs), list[Any](), list[bool]()

    def echo() -> None:
        with theirs:
            while not isinstance(message := wire.receive(), Stop):
                wire.send(message)

    async def talk() -> None:
        protocol = WireProtocol(hear=heard.append, lost=lambda: lost.append(True))
        protocol.send(Abort(id="before"))
        await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
        protocol.send(Abort(id="x" * 3_000_000))
        protocol.send(Stop())
        while not lost:
            await asyncio.sleep(0.01)

    assert not wire.poll()
    thread = threading.Thread(target=echo)
    thread.start()
    asyncio.run(asyncio.wait_for(talk(), 10))
    thread.join()
    assert [len(message.id) for message in heard] == [6, 3_000_000]


def test_the_end_of_a_wire_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"\0\0")
    ours.close()
    with theirs:
        wire = Wire(theirs)
        assert wire.poll()
        with pytest.raises(EOFError):
            wire.receive()


def test_names_of_tokens() -> None:
    names = Vocabulary(byte_tokenizer())
    assert (names.text(65), names.bytes(65)) == ("A", [65])
    assert names.text(32) == " " and names.text(10) == "\n"
    assert (names.text(0xE2), names.bytes(0xE2)) == ("bytes:\\xe2", [0xE2])
    assert names.text(256) == "<|endoftext|>"
    assert names.text(99_999) == ""
    bpe = train_bpe(["ünder the bridge " * 50], 270)
    tokens = bpe("ünder the bridge")["input_ids"]
    whole = b"".join(bytes(Vocabulary(bpe).bytes(token)) for token in tokens)
    assert whole.decode() == "ünder the bridge"
    size = len(bpe)
    assert len({Vocabulary(bpe).text(token) for token in range(size)}) == size


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "65535"),
        ({"api_key": " "}, "api_key"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_choices": 0}, "max_choices=0"),
        ({"write_seconds": 0}, "write_seconds=0"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ServeOptions(model_name="m", **wrong)


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True), ("example", True)],
)
def test_who_can_reach_a_host(host: str, public: bool) -> None:
    assert ServeOptions(model_name="m", host=host).is_public is public


@pytest.mark.parametrize(
    ("origin", "may"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:3000", True),
        ("http://[::1]:8000", True),
        ("https://page.example", True),
        ("https://evil.example", False),
        ("http://127.0.0.1.evil.example:8000", False),
        ("http://localhost@evil.example", False),
        ("http://[bad", False),
        ("null", False),
    ],
)
def test_which_pages_may_ask_a_server_of_this_machine(origin: str, may: bool) -> None:
    here = ServeOptions(model_name="m", cors_origins=("https://page.example",))
    assert here.may_ask(origin) is may
    for open_to_all in (dict(api_key="k"), dict(host="0.0.0.0"), dict(cors_origins=("*",))):
        assert replace(here, **open_to_all).may_ask(origin)


def test_speed_is_that_of_the_last_ten_seconds() -> None:
    now = [100.0]
    rate = TokenRate(lambda: now[0])
    for _ in range(20):
        rate.add(50)
        now[0] += 1
    assert rate() == pytest.approx(50, rel=0.2)
    now[0] += 30
    assert rate() == 0


def test_numbers_of_depths() -> None:
    metrics = Metrics()
    metrics.opened(ModelFacts(
        vocab_size=9, max_length=8, num_recursions=3, has_dial=True, mean_depth=2.0, kv_bytes=(1, 2, 3), num_pages=7,
    ))  # fmt: skip
    first = News("s", 4, 1, text="xxx", depths=(1, 3, 3), tokens=(), finish_reason=None, error=None)
    metrics.heard(first, since_open=0.3, since_last=None)
    metrics.heard(first._replace(depths=(1, 2), finish_reason="stop"), since_open=0.5, since_last=0.2)
    metrics.loaded(Load(running=2, waiting=5, pages_free=3, visits=1, rows=1, preemptions=4))
    metrics.loaded(Load(running=1, waiting=5, pages_free=3, visits=1, rows=1, preemptions=6))
    values = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if not line.startswith("#"))
    expected = {
        'mor_token_depth_bucket{le="1.0"}': 2,
        'mor_token_depth_bucket{le="2.0"}': 3,
        'mor_token_depth_bucket{le="3.0"}': 5,
        'mor_token_depth_bucket{le="+Inf"}': 5,
        "mor_token_depth_sum": 10,
        "mor_token_depth_count": 5,
        "mor_mean_depth": 2,
        "mor_prompt_tokens_total": 4,
        "mor_generated_tokens_total": 5,
        "mor_time_to_first_token_seconds_sum": 0.3,
        'mor_inter_token_seconds_bucket{le="0.05"}': 0,
        'mor_inter_token_seconds_bucket{le="0.1"}': 2,
        "mor_inter_token_seconds_sum": 0.2,
        'mor_samples_total{reason="stop"}': 1,
        "mor_requests_running": 1,
        "mor_requests_waiting": 5,
        "mor_kv_pages_total": 7,
        "mor_kv_pages_free": 3,
        "mor_preemptions_total": 6,
    }
    assert {name: float(values[name]) for name in expected} == pytest.approx(expected)


def test_prompts_that_are_scored_alone_are_counted() -> None:
    metrics = Metrics()
    news = News("s", 7, 0, text="", depths=(), tokens=(), finish_reason="length", error=None)
    metrics.heard(news, since_open=0.3, since_last=None)
    lines = metrics.text().decode().splitlines()
    assert "mor_prompt_tokens_total 7.0" in lines and "mor_time_to_first_token_seconds_count 0.0" in lines


def test_any_loops_transport_serves() -> None:
    """Those of uvloop are no subclass of asyncio's."""

    class Transport:
        def __init__(self) -> None:
            self.written: list[bytes] = []

        def write(self, data: bytes) -> None:
            self.written.append(data)

        def writelines(self, parts: list[bytes]) -> None:
            self.written += parts

    transport, heard = Transport(), list[object]()
    wire = WireProtocol(hear=heard.append, lost=lambda: None)
    wire.send("before")
    wire.connection_made(transport)  # type: ignore[arg-type]
    wire.send("after")
    wire.data_received(b"".join(transport.written))
    assert heard == ["before", "after"]
