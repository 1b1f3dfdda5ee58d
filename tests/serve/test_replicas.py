"""Two replicas behind a router: one is killed under load, and the other's requests do not notice."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.serve.commands import process, replica, wait_healthy
from tests.serve.crowd import crowd
from tests.serve.tiny_engine import save_model
from tests.train.processes import free_port

ROUTER = os.environ.get("VLLM_ROUTER") or shutil.which("vllm-router")
RAY_SERVE = os.environ.get("RAY_SERVE") or shutil.which("serve")
pytestmark = pytest.mark.slow


@pytest.mark.skipif(not ROUTER, reason="needs vllm-router")
def test_a_replica_is_killed_behind_vllm_router(tmp_path: Path) -> None:
    model, port = save_model(tmp_path / "model"), free_port()
    with (
        replica(model, "--name", "tiny", log=tmp_path / "first") as (first, url_1),
        replica(model, "--name", "tiny", log=tmp_path / "second") as (_, url_2),
    ):
        command = f"{ROUTER} --port {port} --worker-urls {url_1} {url_2} --policy round_robin"
        health = "--health-check-interval-secs 1 --health-failure-threshold 1 --health-check-endpoint /health"
        url, log = f"http://127.0.0.1:{port}", tmp_path / "router"
        with process(f"{command} {health} --prometheus-port {free_port()}".split(), log=log):
            wait_healthy(url)
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
            kill = lambda: os.killpg(first.pid, signal.SIGKILL)  # noqa: E731
            outcomes = asyncio.run(crowd(url, num_clients=8, each=12, tokens=40, kill=kill))
            assert outcomes.wrong == []
            assert outcomes.whole + outcomes.failed == 96
            assert outcomes.failed <= 8, log.read_text()[-2000:]  # those that the dead replica worked on
            after = asyncio.run(crowd(url, num_clients=4, each=4, tokens=10, kill=lambda: None))
            assert (after.whole, after.failed) == (16, 0)


@pytest.mark.skipif(not RAY_SERVE, reason="needs Ray Serve")
def test_a_replica_of_ray_serve_is_killed(tmp_path: Path) -> None:
    model, url, log = save_model(tmp_path / "model"), "http://127.0.0.1:8000", tmp_path / "log"
    command = [str(RAY_SERVE), "run", "mor.serve.ray:app", f"model={model}", "name=tiny", "replicas=2", "threads=1"]
    before = replicas_of_ray()
    with process(command, log=log) as serve:
        try:
            wait_healthy(url)
            ours = replicas_of_ray() - before
            assert len(ours) == 2, log.read_text()
            kill = lambda: os.kill(ours.pop(), signal.SIGKILL)  # noqa: E731
            outcomes = asyncio.run(crowd(url, num_clients=8, each=12, tokens=40, kill=kill))
            assert outcomes.wrong == []
            assert outcomes.whole + outcomes.failed == 96
            assert outcomes.failed <= 8, log.read_text()[-2000:]
            after = asyncio.run(crowd(url, num_clients=4, each=4, tokens=10, kill=lambda: None))
            assert (after.whole, after.failed) == (16, 0)
        finally:
            serve.send_signal(signal.SIGINT)  # it takes its cluster along
            serve.wait(60)


def replicas_of_ray() -> set[int]:
    """Processes that are replicas."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:default:mor" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found
