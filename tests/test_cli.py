"""The `mor` command itself: help, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mor import __version__
from mor.cli import COMMANDS, main
from tests.commands.running import fails, works


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--help",), ("help",)):
        out = works(capsys, *words)
        assert all(name in out and command.summary in out for name, command in COMMANDS.items())
    assert works(capsys, "--version") == f"mor {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"usage: mor {name}" in works(capsys, name, "--help")


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mor.cli import main\n"
        "for words in (['--help'], ['train', '--help'], ['evaluate', '--help'], ['demo', '--help']): main(words)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich', 'numpy', 'yaml')))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "mor", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mor: unknown command 'nonsense'; did you mean")


@pytest.mark.parametrize(("wrong", "right"), [("evalute", "evaluate"), ("gen", "generate"), ("recipe", "recipes")])
def test_unknown_command_suggests_the_nearest(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean {right!r}?" in fails(capsys, wrong)


def test_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "generate", "m", "p", "--temprature=1")
    assert "'--temprature=1'; did you mean '--temperature'?" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("generate", "m"), "required: PROMPT"),
        (("evaluate", "m"), "required: --data"),
        (("evaluate", "m", "--data", "d", "--decision", "best"), "invalid choice: 'best'"),
        (("evaluate", "m", "--data", "d", "--mean-depth", "1,x"), "'1,x' is not a list of numbers"),
        (("generate", "m", "p", "--seed", "x"), "invalid int value: 'x'"),
        (("data",), "required"),
        (("convert", "a", "b"), "required: --from"),
    ],
)
def test_wrong_words_are_one_line(words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in fails(capsys, *words)


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ValueError("a=1\n  is wrong"), 2, "mor: a=1 is wrong"),
        (FileNotFoundError("no such thing"), 2, "no such thing"),
        (OSError(28, "No space left on device", "f"), 2, "mor: No space left on device: f"),
        (ImportError("needs pyarrow"), 2, "needs pyarrow"),
        (RuntimeError("diverged"), 1, "diverged"),
        (FloatingPointError("loss is nan"), 1, "loss is nan"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr("mor.commands.recipes.run", run)
    assert part in fails(capsys, "recipes", code=code)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("mor.commands.recipes.run", run)
    with pytest.raises(AssertionError, match="ours"):
        main(["recipes"])


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def run(_: object) -> None:
        warnings.warn("mind the\n gap", stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr("mor.commands.recipes.run", run)
    assert main(["recipes"]) == 0
    assert capsys.readouterr().err == "mor: warning: mind the gap\n"


def test_a_closed_pipe_is_no_accident() -> None:
    done = subprocess.run(
        f"{sys.executable} -m mor recipes 360m-mor-3 | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
