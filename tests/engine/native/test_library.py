"""The C program is compiled once, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mor.engine.native.library import open_library

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@needs_compiler
def test_compiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert open_library(tmp_path / "new").mor_layers
    [made] = (tmp_path / "new").iterdir()
    changed = made.stat().st_mtime_ns
    assert open_library(tmp_path / "new").mor_draw and made.stat().st_mtime_ns == changed


def test_names_the_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(OSError, match=r"false cannot compile .*native: exit status 1"):
        open_library(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OSError, match="no-such-compiler"):
        open_library(tmp_path)
