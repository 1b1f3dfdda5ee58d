"""Clients that vanish, dawdle or are too many; engines that break: each costs no more than itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.serving import Running, error_of, running
from tests.serve.sources import CRASH, HANG, RAISE, TinySource

LONG = dict(max_tokens=200, ignore_eos=True)
SLOW = dict(seconds=0.02, options={"prefix_caching": False, "max_requests": 4})


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """A server whose visits take their time, so that requests last for seconds. Two samples may wait, four run."""
    with running(
        TinySource(**SLOW), max_waiting=2, max_unread=60, read_seconds=1.0, write_seconds=1.0, max_body_bytes=20_000
    ) as server:
        yield server


def is_idle(server: Running) -> bool:
    """Whether nothing is open, and every page is free."""
    load = server.engine.load
    return not server.engine.num_open and load is not None and not load.running and load.pages_free == 2000


def raw(server: Running, data: bytes, **options: int) -> socket.socket:
    """A connection on which `data` was sent."""
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.connect(("127.0.0.1", server.server.port))
    connection.sendall(data)
    return connection


def request_bytes(**fields: object) -> bytes:
    body = json.dumps({"prompt": "abc", **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(slow: Running, stream: bool) -> None:
    connection = raw(slow, request_bytes(**LONG, n=2, stream=stream))
    slow.wait_until(lambda: slow.engine.load is not None and slow.engine.load.running == 2)
    assert not is_idle(slow)
    connection.close()
    slow.wait_until(lambda: is_idle(slow), seconds=1.0)  # the whole answer takes four


def test_a_client_that_goes_away_while_it_waits(slow: Running) -> None:
    running_ones = [raw(slow, request_bytes(**LONG)) for _ in range(4)]
    slow.wait_until(lambda: slow.engine.load is not None and slow.engine.load.running == 4)
    waiting = raw(slow, request_bytes(**LONG))
    slow.wait_until(lambda: slow.engine.num_open == 5)
    waiting.close()
    slow.wait_until(lambda: slow.engine.num_open == 4, seconds=1.0)
    for connection in running_ones:
        connection.close()
    slow.wait_until(lambda: is_idle(slow))


def test_too_many_are_told_to_come_back(slow: Running) -> None:
    connections = [raw(slow, request_bytes(**LONG, n=3)) for _ in range(2)]
    slow.wait_until(lambda: slow.engine.num_open == 6)
    refused = slow.complete(max_tokens=1)
    assert error_of(refused, 429)["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert error_of(slow.complete(max_tokens=1, stream=True), 429)
    for connection in connections:
        connection.close()
    slow.wait_until(lambda: is_idle(slow))
    assert slow.complete(max_tokens=1).status_code == 200


def test_a_request_that_can_never_fit_is_no_wait(slow: Running) -> None:
    assert error_of(slow.complete(n=7, max_tokens=1), 400)["param"] == "n"


def narrow(server: Running, data: bytes) -> socket.socket:
    """A connection through which little fits at a time, and on which `data` was sent."""
    connection = raw(server, b"", SO_RCVBUF=1024)
    server.wait_until(lambda: len(server.server.server_state.connections) == 2)
    for other in server.server.server_state.connections:
        other.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection.sendall(data)
    server.wait_until(lambda: server.engine.num_open == 3)
    return connection


def test_a_slow_reader_loses_its_request_and_nobody_else(slow: Running) -> None:
    """What is written to it fills the connection's buffers, then the stream's: then it has left too much unread."""
    connection = narrow(slow, request_bytes(**LONG, n=3, logprobs=20, stream=True))
    assert slow.complete(max_tokens=20, ignore_eos=True).status_code == 200
    slow.wait_until(lambda: is_idle(slow), seconds=3.5)  # the whole answer takes four seconds
    slow.wait_until(lambda: len(slow.server.server_state.connections) == 1)  # cut off
    connection.close()


def test_a_whole_answer_that_nobody_reads_is_not_kept(slow: Running) -> None:
    connection = narrow(slow, request_bytes(max_tokens=60, ignore_eos=True, n=3, logprobs=20))
    slow.wait_until(lambda: is_idle(slow))
    slow.wait_until(lambda: len(slow.server.server_state.connections) == 1, seconds=4.0)
    connection.close()


def test_an_answer_that_is_read_slowly_comes_whole(slow: Running) -> None:
    connection = narrow(
        slow,
        request_bytes(max_tokens=60, ignore_eos=True, n=3, logprobs=20).replace(
            b"Host: x", b"Host: x\r\nConnection: close"
        ),
    )
    slow.wait_until(lambda: is_idle(slow))
    begin, received = time.monotonic(), b""
    while part := connection.recv(4_000):  # for longer than a write may stand still
        received += part
        time.sleep(0.02)
    connection.close()
    assert time.monotonic() - begin > 1.5, len(received)
    assert json.loads(received.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 180


def test_requests_that_come_slowly_are_cut(slow: Running) -> None:
    head = raw(slow, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    silent = raw(slow, b"")
    body = raw(slow, request_bytes()[:-5])
    for connection in (head, silent, body):
        connection.settimeout(10)
    for connection in (head, silent):
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""
    answer = body.recv(4000)
    while b"body_too_slow" not in answer:
        part = body.recv(4000)
        assert part, answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    for connection in (head, silent, body):
        connection.close()


def test_large_bodies_are_refused(slow: Running) -> None:
    told = slow.client.post("/v1/completions", content=b"x" * 20_001, headers={"content-type": "application/json"})
    assert error_of(told, 413)["code"] == "body_too_large"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    connection = raw(slow, head + b"\r\n\r\n" + 21 * (b"3e8\r\n" + b"x" * 1000 + b"\r\n"))
    connection.settimeout(10)
    assert connection.recv(4000).startswith(b"HTTP/1.1 413")
    connection.close()


def test_the_loop_answers_while_the_engine_is_busy(slow: Running) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(slow.complete, max_tokens=50, ignore_eos=True) for _ in range(4)]
        slow.wait_until(lambda: slow.engine.num_open == 4)
        start = time.monotonic()
        assert slow.client.get("/health").status_code == 200
        assert time.monotonic() - start < 0.5
        assert all(answer.result().status_code == 200 for answer in answers)


def test_a_key_is_asked_for() -> None:
    keep = dict(api_key="sésame", cors_origins=("https://page.example",))
    with running(TinySource(open_seconds=5, unable="never mind"), ready=False, **keep) as server:
        assert server.client.get("/health").status_code == 503  # without a key
        assert server.client.get("/").status_code == 200
        for path in ("/v1/models", "/metrics"):
            refused = server.client.get(path)
            assert error_of(refused, 401)["code"] == "invalid_api_key" and "same" not in refused.text
        assert error_of(server.complete(), 401)["type"] == "authentication_error"
        for wrong in ("Bearer", "Bearer x", "Basic sésame", "Bearer sésame2"):
            assert server.client.get("/metrics", headers={"Authorization": wrong.encode()}).status_code == 401
        for right in ("Bearer sésame", "bearer  sésame"):
            assert server.client.get("/metrics", headers={"Authorization": right.encode()}).status_code == 200
        preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        preflight |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # openai's
        allowed = server.client.options("/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = server.client.options("/v1/completions", headers={**preflight, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_what_is_open_when_the_time_to_end_is_over_is_told_so() -> None:
    with running(TinySource(seconds=0.1), drain_seconds=0.2) as server, ThreadPoolExecutor() as threads:
        whole, stream = (threads.submit(server.complete, **LONG, stream=stream) for stream in (False, True))
        server.wait_until(lambda: server.engine.load is not None and server.engine.load.running == 2)
        server.loop.call_soon_threadsafe(server.server.end)
        assert error_of(whole.result(), 503)["message"] == "the engine is stopping; try again later"
        last = stream.result().text.rstrip().rsplit("\n\n", 1)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_too_many_connections_are_told_so() -> None:
    with running(TinySource(open_seconds=5, unable="never mind"), ready=False, max_connections=2) as server:
        held = [raw(server, request_bytes()[:-5]) for _ in range(2)]
        server.wait_until(lambda: server.client.get("/health").json().get("error"))
        refused = server.client.get("/health")
        assert error_of(refused, 503)["code"] == "too_many" and refused.headers["retry-after"] == "1"
        for connection in held:
            connection.close()
        server.wait_until(lambda: server.client.get("/health").json() == {"status": "starting"})


def test_every_answer_has_the_security_headers(server: Running) -> None:
    for path in ("/", "/health", "/nothing", "/page/app.js"):
        headers = server.client.get(path, headers={"Origin": "https://other.example"}).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers and "server" not in headers


def test_a_crash_is_told_and_mended_once() -> None:
    with running(TinySource(**SLOW)) as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.complete, **LONG)
            streamed = pool.submit(server.complete, stream=True, **LONG)
            server.wait_until(lambda: server.engine.load is not None and server.engine.load.running == 2)
            first = server.engine.pid
            assert error_of(server.complete(CRASH), 503)["code"] == "engine_lost"
            red = server.client.get("/health")
            assert (red.status_code, red.json()["status"]) == (503, "restarting")
            assert int(red.headers["retry-after"]) >= 1
            assert error_of(server.complete(), 503)["code"] == "unavailable"
            assert error_of(whole.result(), 503)["code"] == "engine_lost"
            last = streamed.result().text.rstrip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_lost"
        server.wait_ready()
        assert server.engine.pid != first
        assert server.complete(max_tokens=3).status_code == 200
        assert server.service.metrics.engine_restarts._value.get() == 1
        server.engine._stall_seconds = 0.5
        assert error_of(server.complete(HANG), 503)["code"] == "engine_lost"  # silent for too long
        server.wait_until(lambda: server.engine.state == "failed")
        assert server.client.get("/health").json() == {"status": "failed"}
        assert error_of(server.complete(), 503)


def test_a_visit_that_fails_ends_its_requests_without_details(slow: Running) -> None:
    failed = error_of(slow.complete(RAISE + "x", max_tokens=5), 500)
    assert failed["code"] == "engine_failed" and "secret" not in failed["message"]
    slow.wait_until(lambda: is_idle(slow))
    assert slow.complete(max_tokens=1).status_code == 200


def test_health_is_red_without_a_model() -> None:
    with running(TinySource(open_seconds=0.5, unable="no such thing"), ready=False) as server:
        red = server.client.get("/health")
        assert (red.status_code, red.json()) == (503, {"status": "starting"})
        assert error_of(server.client.get("/v1/models"), 503)
        assert error_of(server.complete(), 503)["code"] == "unavailable"
        server.wait_until(lambda: server.engine.state == "failed")  # and not started again: it would fail again
        assert server.engine.reason == "no such thing"
        assert "no such thing" not in server.client.get("/health").text
        assert server.service.metrics.engine_restarts._value.get() == 0


def test_many_clients_of_all_kinds_leave_nothing_behind(slow: Running) -> None:
    """A small crowd; `bench/serving.py` has the large one."""

    async def well_behaved(client: httpx.AsyncClient) -> bool:
        for _ in range(200):
            reply = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True})
            if reply.status_code == 200:
                return reply.json()["usage"]["completion_tokens"] == 5
            assert reply.status_code == 429
            await asyncio.sleep(0.1)
        return False

    async def vanishing(client: httpx.AsyncClient) -> bool:
        async with client.stream("POST", "/v1/completions", json={"prompt": "abc", "stream": True, **LONG}) as reply:
            async for _ in reply.aiter_bytes():
                return True
        return True

    async def malformed(client: httpx.AsyncClient) -> bool:
        reply = await client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        return reply.status_code == 400

    async def crowd() -> list[bool]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=60) as client:
            kinds = (well_behaved, vanishing, malformed)
            return await asyncio.gather(*(kinds[number % 3](client) for number in range(60)))

    assert all(asyncio.run(crowd()))
    slow.wait_until(lambda: is_idle(slow))
    assert threading.active_count() < 20
