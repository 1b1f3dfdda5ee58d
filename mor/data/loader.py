"""Packed batches of token ids for training and evaluation.

Tensor names: B rows of a batch, T tokens of a row.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mor.data.permutation import Permutation
from mor.data.shards import TokenShards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`input_ids` (B, T) int64; `document_ids` (B, T) int64 or None; `epoch` in which the first row begins, from 0.

    `document_ids` number the documents of each row from 0: positions of one row with the same number belong together.
    """

    input_ids: Tensor
    document_ids: Tensor | None
    epoch: int


class PackedLoader:
    """Endless batches: every epoch gives all rows of `sequence_length` tokens in a new order.

    The documents of the split lie end to end as they were written, each with its end-of-text token, and the last is
    followed by the first. From this ring an epoch cuts rows one after the other, beginning at a place of its own, so
    that what is left over, less than a row, is another part in each. Neighbours in a batch are rows from anywhere: rows
    of one document after the other would teach a model one thing at a time.

    The rows form one global stream, whose batches `world_size` ranks take in turn; it depends on nothing but the
    shards, `seed` and `sequence_length`. Memory does not grow with the split.

    Args:
        batch_size: rows that this rank gets in each batch (B).
        sequence_length: tokens of a row (T).
        document_ids: also give the documents of each row, for attention that stays inside them.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        document_ids: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_positive(batch_size=batch_size, sequence_length=sequence_length, world_size=world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie between 0 and world_size - 1 = {world_size - 1}")
        self.shards = shards
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.document_ids = document_ids
        self.rank = rank
        self.world_size = world_size
        self._data = int(shards.fingerprint[:12], 16)
        self._num_rows = max(1, shards.num_tokens // sequence_length)
        self._epoch = self._row = 0

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank. Raises ValueError when a shard turns out to be damaged."""
        epoch = self._epoch
        ids_BT = np.empty((self.batch_size, self.sequence_length), dtype=np.int64)
        documents_BT = np.zeros_like(ids_BT) if self.document_ids else None
        for number in range(self.batch_size):
            start = self._start(*self._ahead(self.rank * self.batch_size + number))
            self._fill(start, ids_BT[number], None if documents_BT is None else documents_BT[number])
        self._epoch, self._row = self._ahead(self.batch_size * self.world_size)
        return Batch(
            input_ids=torch.from_numpy(ids_BT),
            document_ids=None if documents_BT is None else torch.from_numpy(documents_BT),
            epoch=epoch,
        )

    def state_dict(self) -> dict[str, int]:
        """Where the global stream stands: a few integers, the same on every rank and for every `world_size`."""
        return {
            "epoch": self._epoch,
            "row": self._row,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly where `state` was taken. Raises ValueError when it belongs to other data, another seed or
        another `sequence_length`."""
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"loader state has keys {sorted(state)}, not {sorted(self.state_dict())}: the run was begun by another "
                "version of mor; go on with that one, or start a new run"
            )
        if state["data"] != self._data:
            raise ValueError(f"loader state belongs to other token shards than {self.shards.folder}")
        for name in ("seed", "sequence_length"):
            if state[name] != getattr(self, name):
                raise ValueError(f"loader state belongs to {name}={state[name]}, not {name}={getattr(self, name)}")
        if not 0 <= state["row"] < self._num_rows:
            raise ValueError(f"loader state has row={state['row']} among {self._num_rows} rows of an epoch")
        self._epoch, self._row = state["epoch"], state["row"]

    def _ahead(self, rows: int) -> tuple[int, int]:
        """Epoch and row so many rows from here."""
        epochs, row = divmod(self._row + rows, self._num_rows)
        return self._epoch + epochs, row

    def _start(self, epoch: int, row: int) -> int:
        """Where in the ring a row of an epoch begins."""
        first, order = _epoch_order(self.shards.num_tokens, self._num_rows, f"{self.seed}/{epoch}")
        return (first + order(row) * self.sequence_length) % self.shards.num_tokens

    def _fill(self, start: int, ids_T: np.ndarray, documents_T: np.ndarray | None) -> None:
        """Write the row that begins at `start`, and the numbers of its documents if they are wanted."""
        filled = 0
        while filled < len(ids_T):
            stop = min(start + len(ids_T) - filled, self.shards.num_tokens)
            ids_T[filled : filled + stop - start] = self.shards.read(start, stop)
            if documents_T is not None:
                documents_T[self.shards.document_starts(start, stop) - start + filled] = 1
            filled += stop - start
            start = 0
        if documents_T is not None:
            documents_T[0] = 0
            documents_T.cumsum(out=documents_T)


@functools.lru_cache(maxsize=8)
def _epoch_order(num_tokens: int, num_rows: int, key: str) -> tuple[int, Permutation]:
    """Where an epoch's first row begins, and the order of its rows."""
    return Permutation(num_tokens, f"{key}/first")(0), Permutation(num_rows, key)


def evaluation_batches(
    shards: TokenShards, *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Tensor]:
    """Batches (B, T) int64 of the split in the order in which it was written, in whole rows.

    The last batch may have fewer rows. With `max_tokens`, as many rows as fit are taken at equal distances over the
    split, so that a small evaluation is a sample of all of it. The same arguments give the same batches. Raises
    ValueError when not one row can be given.
    """
    _check_positive(batch_size=batch_size, sequence_length=sequence_length)
    available = shards.num_tokens // sequence_length
    if not available:
        raise ValueError(
            f"split {shards.split!r} of {shards.folder} has {shards.num_tokens} tokens, "
            f"too few for one row of sequence_length={sequence_length}"
        )
    num_rows = available if max_tokens is None else min(available, max_tokens // sequence_length)
    if num_rows < 1:
        raise ValueError(f"max_tokens={max_tokens} is too small for one row of sequence_length={sequence_length}")
    return _spaced_rows(shards, batch_size, sequence_length, [i * available // num_rows for i in range(num_rows)])


def _spaced_rows(shards: TokenShards, batch_size: int, sequence_length: int, rows: list[int]) -> Iterator[Tensor]:
    for first in range(0, len(rows), batch_size):
        starts = [row * sequence_length for row in rows[first : first + batch_size]]
        ids_BT = np.stack([shards.read(start, start + sequence_length) for start in starts])
        yield torch.from_numpy(ids_BT.astype(np.int64))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
