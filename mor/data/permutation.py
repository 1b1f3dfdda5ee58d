"""A random order of any number of things, without writing the order down."""

import hashlib
import math


class Permutation:
    """A bijection of 0..length-1, drawn by `key`; it takes the same few bytes for ten things as for a thousand million.

    A Feistel network on a grid of about sqrt(length) rows and columns: each round shifts the row by a hash of the
    column or the column by a hash of the row, which can be undone and so loses nothing. A result past the
    first `length` cells is sent through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    _NUM_ROUNDS = 6

    def __init__(self, length: int, key: str) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        self.length = length
        self._rows = math.isqrt(length - 1) + 1
        self._columns = -(-length // self._rows)
        self._hashes = [hashlib.blake2b(f"{key}/{i}".encode(), digest_size=8) for i in range(self._NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index`, in 0..length-1, goes."""
        while True:
            index = self._shuffle(index)
            if index < self.length:
                return index

    def _shuffle(self, index: int) -> int:
        row, column = divmod(index, self._columns)
        for i, start in enumerate(self._hashes):
            state = start.copy()
            state.update((row if i % 2 else column).to_bytes(8, "little"))
            shift = int.from_bytes(state.digest(), "little")
            if i % 2:
                column = (column + shift) % self._columns
            else:
                row = (row + shift) % self._rows
        return row * self._columns + column
