"""That the kernels compile for the GPU they are meant for, without spills and with reads of 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_compute_capability_9(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.kernels.compiled"],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = json.loads(run.stdout)
    assert {name: found["stack"] for name, found in kernels.items() if found["stack"]} == {}
    assert all(found["wide"] for found in kernels.values())
