"""The C program of this folder, compiled on the machine it runs on, for its processor, once for all processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("layers.c", "draw.c", "slots.c")]
HEADER = Path(__file__).with_name("threads.h")
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp-simd -shared -fPIC".split()
SECONDS = 120
"""More than a compiler ever takes."""


def open_library(folder: Path | None = None) -> ctypes.CDLL:
    """The compiled program, from `folder` (None: the user's cache) if it was compiled before.

    Raises OSError naming what is missing: a compiler, one that understands the program, or a place to write to.
    """
    compiler = os.environ.get("CC") or next(
        (path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None
    )
    if compiler is None:
        raise OSError("there is no C compiler: none of cc, gcc and clang is on the PATH, and CC is not set")
    folder = _cache() if folder is None else folder
    path = folder / f"native-{_key(compiler)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mor"


def _key(compiler: str) -> str:
    """Of everything that the result depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    known = [*(path.read_text() for path in (*SOURCES, HEADER)), compiler, *FLAGS, platform.machine(), processor]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Other processes see the whole result or none. A compiler without OpenMP gives a program of one thread."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        said = _run(compiler, [*FLAGS, "-fopenmp"], made) and _run(compiler, FLAGS, made)
        if said:
            raise OSError(f"{compiler} cannot compile {SOURCES[0].parent}: {said}")
        made.replace(path)


def _run(compiler: str, flags: Sequence[str], made: Path) -> str:
    """What the compiler complained about, or nothing."""
    command = [*compiler.split(), *flags, "-o", str(made), *map(str, SOURCES), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"nothing after {SECONDS} s"
    return "" if done.returncode == 0 else done.stderr.strip()[-500:] or f"exit status {done.returncode}"
