"""The manifest of a folder of token shards: what is in it, made how, and by which hashes to recognise it.

A shard is two files: `NAME.bin`, the token ids of its documents one after the other, each document closed by the token
that ends it, and `NAME.ends.bin`, for each document the number of ids up to its end. All integers are little-endian.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mor.config import from_dict
from mor.data.split import Split

VERSION = 1
FILE_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
END_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its name, its counts, and the sha256 of its two files. `tokens` counts the ends of documents too."""

    name: str
    documents: int
    tokens: int
    tokens_sha256: str
    ends_sha256: str

    def tokens_file(self, folder: Path) -> Path:
        """Where the token ids are."""
        return folder / f"{self.name}.bin"

    def ends_file(self, folder: Path) -> Path:
        """Where the ends of the documents are."""
        return folder / f"{self.name}.ends.bin"


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split: its counts, the UTF-8 bytes of its text, and its shards in order."""

    documents: int
    tokens: int
    utf8_bytes: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of token shards holds. `source` is what its source of documents said of itself, or None."""

    version: int = VERSION
    dtype: Literal["uint16", "uint32"]
    vocabulary_size: int
    eos_token_id: int
    tokenizer_fingerprint: str
    validation_fraction: float
    shard_tokens: int
    source: dict[str, Any] | None
    splits: dict[Split, SplitEntry]

    @property
    def token_bytes(self) -> int:
        """Bytes per token id."""
        return 2 if self.dtype == "uint16" else 4


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest in `folder`.

    Raises FileNotFoundError when there is none, ValueError when it is damaged or of another version.
    """
    path = Path(folder) / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no token shards in {folder}: it has no {FILE_NAME}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else None
        raise ValueError(f"{path} has version {found!r}; only version {VERSION} can be read: make the shards again")
    try:
        return from_dict(Manifest, values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_files(folder: Path, manifest: Manifest, split: Split) -> None:
    """Raises FileNotFoundError for a missing file of `split`, ValueError for one of the wrong size."""
    for shard in manifest.splits[split].shards:
        expected = {
            shard.tokens_file(folder): shard.tokens * manifest.token_bytes,
            shard.ends_file(folder): shard.documents * END_BYTES,
        }
        for file, num_bytes in expected.items():
            if not file.is_file():
                raise FileNotFoundError(f"shard {file} is missing, though the manifest lists it")
            found = file.stat().st_size
            if found != num_bytes:
                kind = "truncated" if found < num_bytes else "too long"
                raise ValueError(f"shard {file} is {kind}: {found} bytes where the manifest says {num_bytes}")
