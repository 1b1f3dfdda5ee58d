"""Where a result comes from: command, commit, machine and data."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mor import __version__
from mor.data.manifest import FILE_NAME
from mor.show.machine import describe_machine


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`commit`: of the source tree, with `+changes` where files differ from it; None where there is no repository.
    `data`, `held_out`: sha256 of the manifests of the shards trained and measured on, without where their text was
    read; a manifest holds the hashes of all files."""

    command: str
    version: str
    commit: str | None
    machine: dict[str, str]
    data: str
    held_out: str


def provenance(data: str | Path, held_out: str | Path | None, device: torch.device) -> Provenance:
    """Of what runs now. Raises FileNotFoundError when there are no shards at `data` or `held_out`."""
    return Provenance(
        command=shlex.join(["mor", *sys.argv[1:]]),
        version=__version__,
        commit=commit(Path(__file__).parents[1]),
        machine=describe_machine(device),
        data=data_fingerprint(data),
        held_out=data_fingerprint(held_out or data),
    )


def data_fingerprint(folder: str | Path) -> str:
    """sha256 of the manifest without its source. Raises FileNotFoundError when there is none."""
    manifest = json.loads((Path(folder) / FILE_NAME).read_text(encoding="utf-8"))
    del manifest["source"]
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def commit(folder: Path) -> str | None:
    """The commit that the package in `folder` is at; None where no repository holds it. What the environment variable
    MOR_COMMIT says goes before, for copies of the files, which may lie in a repository of another state."""
    if given := os.environ.get("MOR_COMMIT"):
        return given
    head, held = _git(folder, "rev-parse", "HEAD"), _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    if head is None or held is None:
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
