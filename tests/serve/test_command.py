"""`mor serve` as a process: it says when it is ready, and ends in order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import httpx
import pytest

from mor.cli import main
from mor.serve.worker import ModelFolder
from tests.serve.commands import process, replica
from tests.serve.tiny_engine import save_model

LONG = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "tiny" / "final")


def test_sigterm_finishes_what_is_open_and_exits_with_0(model: Path, tmp_path: Path) -> None:
    with replica(model, log=tmp_path / "log") as (server, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            red = httpx.get(f"{url}/health")
            while red.status_code == 200:
                red = httpx.get(f"{url}/health")
            assert red.json() == {"status": "draining"}
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 503
            text = "\n".join(lines)
        assert text.count('"finish_reason":"length"') == 8 and text.rstrip().endswith("[DONE]")
        assert server.wait(20) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_that_dies_takes_its_engine_along(model: Path, tmp_path: Path) -> None:
    with replica(model, "--api-key", "k", log=tmp_path / "log") as (server, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        engine = next(pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        server.kill()
        server.wait(10)
        ended = threading.Event()
        for _ in range(200):
            state = Path(f"/proc/{engine}/stat")
            if not state.exists() or state.read_text().rsplit(")")[-1].split()[0] == "Z":
                return
            ended.wait(0.05)
        os.kill(int(engine), signal.SIGKILL)
        raise AssertionError("the engine outlives its server")


def test_a_damaged_model_ends_the_server_with_its_reason(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    with process([sys.executable, "-m", "mor", "serve", str(broken), "--port", "0"]) as server:
        output, _ = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "damaged" in output and "Traceback" not in output


def test_mistakes_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{% for %}")
    for words, says in (
        (["no-such-folder"], "no such model"),
        ([str(model), "--port", "70000"], "65535"),
        ([str(model), "--chat-template", str(template)], "line 1"),
        ([str(model), "--max-requests", "0"], "max_requests"),
    ):
        assert main(["serve", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert says in line


def test_names_of_models(tmp_path: Path) -> None:
    assert ModelFolder(path=str(tmp_path / "mine")).name == "mine"
    assert ModelFolder(path=str(tmp_path / "run" / "final")).name == "run"
    assert ModelFolder(path=str(tmp_path / "run" / "checkpoints" / "step-000100")).name == "run"
