"""Files as a few numbers by which to notice that one of them changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def summarise(root: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Names (relative to `root`), sizes and times of change of `files`, summed up; independent of where `root` is."""
    listing = hashlib.sha256()
    num_files = num_bytes = 0
    for file in files:
        status = file.stat()
        num_files += 1
        num_bytes += status.st_size
        name = file.relative_to(root).as_posix() if file != root else file.name
        listing.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return {"name": root.name, "files": num_files, "bytes": num_bytes, "listing": listing.hexdigest()}
