"""The pages of all requests that decode in slots, reckoned at once: the rules of `mor.engine.scheduler`, on arrays.

Legend: N requests, Q virtual sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from mor.engine.cache_shape import CacheShape
from mor.engine.request import Lacks, Request


class SlotPages:
    """What requests have, as they are when this is made."""

    def __init__(self, shape: CacheShape, requests: Sequence[Request]) -> None:
        self._shape, self._requests = shape, requests
        self._sizes_Q = np.array(shape.tokens_per_page)
        self._lengths_NQ = self._rows(chain.from_iterable([request.lengths for request in requests]))
        self._have_NQ = self._rows(map(len, chain.from_iterable([request.pages for request in requests])))
        self._most_N1 = np.array([request.most_computed for request in requests])[:, None]

    def _rows(self, values: Iterable[int]) -> np.ndarray:
        count = len(self._requests) * self._shape.num_sequences
        return np.fromiter(values, np.int64, count).reshape(len(self._requests), -1)

    def num_lacking(self, visits: int) -> int:
        """Pages that all requests together lack for so many visits."""
        return int(self._lack(visits).sum())

    def _lack(self, visits: int) -> np.ndarray:
        reach_NQ = np.minimum(self._lengths_NQ + np.array(self._shape.growths(visits)), self._most_N1)
        return np.maximum(-(-reach_NQ // self._sizes_Q) - self._have_NQ, 0)

    def lacks(self, visits: int) -> dict[Request, Lacks]:
        """What requests lack for so many visits, of those that lack any. From here on these pages count as had."""
        lack_NQ = self._lack(visits)
        self._have_NQ += lack_NQ
        lacks = dict[Request, Lacks]()
        number, sequence = lack_NQ.nonzero()
        each = zip(number.tolist(), sequence.tolist(), lack_NQ[number, sequence].tolist(), strict=True)
        for n, s, count in each:
            lacks.setdefault(self._requests[n], []).append((s, count))
        return lacks

    def outstanding(self, room_to_grow: int) -> int:
        """Pages that the requests may still take for the tokens known of them and those they have room to grow by."""
        computed_N1 = np.array([request.num_computed for request in self._requests])[:, None]
        known_N1 = computed_N1 + 1  # in a slot, all tokens but the last are computed
        known_N1 = np.maximum(known_N1, np.minimum(self._most_N1, known_N1 + room_to_grow))
        most_NQ = np.minimum(known_N1, known_N1 - computed_N1 + self._lengths_NQ)
        worst_N = (-(-most_NQ // self._sizes_Q))[:, np.array(self._shape.written)].sum(1)
        return int(np.maximum(worst_N - self._have_NQ.sum(1), 0).sum())
