"""Packed batches of token ids for training and evaluation.

Tensor names: B rows of a batch, T tokens of a row.
"""

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


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a document, from `start` to `stop`, that a row holds."""

    document: int
    start: int
    stop: int


class PackedLoader:
    """Endless batches: every epoch gives all documents in a new order, end to end, cut into rows of `sequence_length`.

    Each document ends with its end-of-text token, and the last tokens of an epoch share a row with the first of the
    next, so that an epoch gives every token exactly once. The rows form one global stream, whose batches `world_size`
    ranks take in turn; it depends on nothing but the shards, `seed` and `sequence_length`. Memory does not grow with
    the number of documents.

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
        self._move(epoch=0, position=0, offset=0)

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank. Raises ValueError when a shard turns out to be damaged."""
        epoch = self._epoch
        shape = (self.batch_size, self.sequence_length)
        ids_BT = np.empty(shape, dtype=np.int64)
        documents_BT = np.empty(shape, dtype=np.int64)
        for row in range(self.batch_size * self.world_size):
            pieces = self._next_row()
            rank, place = divmod(row, self.batch_size)
            if rank == self.rank:
                self._fill(pieces, ids_BT[place], documents_BT[place])
        return Batch(
            input_ids=torch.from_numpy(ids_BT),
            document_ids=torch.from_numpy(documents_BT) if self.document_ids else None,
            epoch=epoch,
        )

    def state_dict(self) -> dict[str, int]:
        """Where the global stream stands: a few integers, the same on every rank and for every `world_size`."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "offset": self._offset,
            "seed": self.seed,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly where `state` was taken. Raises ValueError when it belongs to other data or another seed."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"loader state has keys {sorted(state)}; expected {sorted(self.state_dict())}")
        if state["data"] != self._data:
            raise ValueError(f"loader state belongs to other token shards than {self.shards.folder}")
        if state["seed"] != self.seed:
            raise ValueError(f"loader state belongs to seed={state['seed']}, not seed={self.seed}")
        if not 0 <= state["position"] < len(self.shards):
            raise ValueError(f"loader state has position={state['position']} among {len(self.shards)} documents")
        self._move(epoch=state["epoch"], position=state["position"], offset=state["offset"])
        if not 0 <= self._offset < self._length:
            raise ValueError(f"loader state has offset={self._offset} in a document of {self._length} tokens")

    def _move(self, *, epoch: int, position: int, offset: int) -> None:
        """Go to token `offset` of the document that is at `position` in the order of `epoch`."""
        self._epoch, self._position, self._offset = epoch, position, offset
        self._order = Permutation(len(self.shards), f"{self.seed}/{epoch}")
        self._document = self._order(position)
        self._length = self.shards.document_length(self._document)

    def _next_row(self) -> list[Piece]:
        """What the next row of the global stream holds; moves on to its end."""
        pieces: list[Piece] = []
        missing = self.sequence_length
        while missing:
            stop = min(self._offset + missing, self._length)
            pieces.append(Piece(document=self._document, start=self._offset, stop=stop))
            missing -= stop - self._offset
            if stop < self._length:
                self._offset = stop
            elif self._position + 1 < len(self.shards):
                self._position, self._offset = self._position + 1, 0
                self._document = self._order(self._position)
                self._length = self.shards.document_length(self._document)
            else:
                self._move(epoch=self._epoch + 1, position=0, offset=0)
        return pieces

    def _fill(self, pieces: list[Piece], ids_T: np.ndarray, documents_T: np.ndarray) -> None:
        filled = 0
        for number, piece in enumerate(pieces):
            end = filled + piece.stop - piece.start
            ids_T[filled:end] = self.shards.document(piece.document, piece.start, piece.stop)
            documents_T[filled:end] = number
            filled = end


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
