"""What the device knows of every request that decodes: one slot each, as rows of a few tensors.

Legend: S slots, Q virtual sequences, X pages of a sequence, R recursions, D hidden size, K visits of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mor.engine.kv_store import PageLayout
from mor.engine.sending import sent

NUM_STOPS = 8
"""Tokens of a request that end it on the device; with more, the host ends it a few visits later."""

RESTING = -1
NOTHING, BROKEN = -1, -2


class Int(IntEnum):
    """Columns of `SlotState.ints`.

    TOKEN: the last token known, and NUMBER its place in its request. RECURSION: the one that its next visit takes, or
    RESTING when it has them all. ACTIVE: whether that visit's output counts (where the first recursion serves all
    tokens, some take it for its keys and values alone). DEPTH: block applications so far. LIVE, FRESH: whether there is
    a request, and whether its token is still to enter. MADE, LEFT: tokens sampled, and still to sample. LIMIT: the most
    recursions. TARGET: the recursion chosen for the token, with a router that chooses once. SEED, TOP_K: of sampling.
    """

    TOKEN = 0
    NUMBER = 1
    RECURSION = 2
    ACTIVE = 3
    DEPTH = 4
    LIVE = 5
    FRESH = 6
    MADE = 7
    LEFT = 8
    LIMIT = 9
    TARGET = 10
    SEED = 11
    TOP_K = 12
    STOPS = 13  # and NUM_STOPS - 1 more


class Float(IntEnum):
    """Columns of `SlotState.floats`; THRESHOLDS are R of them."""

    GATE = 0
    TEMPERATURE = 1
    TOP_P = 2
    MIN_P = 3
    THRESHOLDS = 4


class Report(IntEnum):
    """What a visit says of a slot: the sampled TOKEN (NOTHING, or BROKEN if there was none to sample), the DEPTH of the
    position that predicted it, and the bits of its float32 log-probability."""

    TOKEN = 0
    DEPTH = 1
    LOGPROB = 2


@dataclass(frozen=True, kw_only=True)
class SlotRow:
    """A request that takes a slot: the initial values of its row. `stops`: at most `NUM_STOPS`, the device's own."""

    slot: int
    token: int
    number: int
    made: int
    left: int
    limit: int
    seed: int
    lengths: Sequence[int]
    stops: Sequence[int] = ()
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    thresholds: Sequence[float] = ()

    @cached_property
    def is_limited(self) -> bool:
        """Whether it draws with top-k or top-p."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    def ints(self) -> list[int]:
        """Columns of `SlotState.ints`."""
        values = [0] * Int.STOPS
        values[Int.TOKEN], values[Int.NUMBER], values[Int.RECURSION] = self.token, self.number, RESTING
        values[Int.LIVE], values[Int.FRESH] = 1, 1
        values[Int.MADE], values[Int.LEFT], values[Int.LIMIT] = self.made, self.left, self.limit
        values[Int.SEED], values[Int.TOP_K] = self.seed, self.top_k
        return [*values, *self.stops, *[NOTHING] * (NUM_STOPS - len(self.stops))]

    def floats(self) -> list[float]:
        """Columns of `SlotState.floats`."""
        return [0.0, self.temperature, self.top_p, self.min_p, *self.thresholds]


@dataclass(kw_only=True)
class Edits:
    """What changes between two batches: requests that take slots, slots that are emptied, and new pages: (slot,
    sequence, number of the first one in it, pages)."""

    rows: list[SlotRow] = field(default_factory=list[SlotRow])
    emptied: list[int] = field(default_factory=list[int])
    pages: list[tuple[int, int, int, list[int]]] = field(default_factory=list[tuple[int, int, int, list[int]]])


class SlotState:
    """The rows of all slots, and one more: of no slot, where what concerns none is written.

    `ints` (S+1, columns of `Int`, each of which lies together), `floats` (S+1, columns of `Float`), `lengths` (S+1, Q)
    entries of each sequence, `tables` (S+1, Q, X) pages. `stream` and `x` (S+1, D): the residual stream, and the input
    of the next recursion. `reports` (K, 3, S+1): see `Report`; `visit` (1,): how many visits of the batch are done.
    """

    def __init__(
        self, layout: PageLayout, num_slots: int, max_length: int, *, hidden_size: int, most_visits: int, like: Tensor
    ) -> None:
        shape, device = layout.shape, like.device
        rows, width = num_slots + 1, -(-max_length // min(shape.tokens_per_page))
        self.num_slots, self.most_visits = num_slots, most_visits
        self.ints = torch.zeros(Int.STOPS + NUM_STOPS, rows, dtype=torch.int64, device=device).t()
        self.floats = torch.zeros(rows, Float.THRESHOLDS + shape.num_recursions, dtype=torch.float64, device=device)
        self.floats[:, Float.TOP_P] = 1
        self.lengths = torch.zeros(rows, shape.num_sequences, dtype=torch.int64, device=device)
        self.tables = torch.zeros(rows, shape.num_sequences, width, dtype=torch.int32, device=device)
        self.stream = torch.zeros(rows, hidden_size, dtype=like.dtype, device=device)
        self.x = torch.zeros_like(self.stream)
        self.reports = torch.full((most_visits, len(Report), rows), NOTHING, dtype=torch.int32, device=device)
        self.visit = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self.ints.device

    def edit(self, edits: Edits) -> None:
        """Make the changes, in the device's order of work."""
        if edits.emptied:
            self.ints[:, Int.LIVE].index_fill_(0, self._sent(edits.emptied), 0)
        if edits.pages:
            place, page = self._sent(self._places(edits))
            self.tables.view(-1).index_copy_(0, place, page.int())
        if edits.rows:
            slots = self._sent([row.slot for row in edits.rows])
            self.ints.index_copy_(0, slots, self._sent([row.ints() for row in edits.rows]))
            self.lengths.index_copy_(0, slots, self._sent([list(row.lengths) for row in edits.rows]))
            floats = self._sent([row.floats() for row in edits.rows], torch.float64)
            self.floats.index_copy_(0, slots, floats)

    def begin_batch(self) -> None:
        """Forget what the last batch reported."""
        self.reports.fill_(NOTHING)
        self.visit.zero_()

    def snapshot(self) -> list[Tensor]:
        """Copies of what a visit changes."""
        return [tensor.clone() for tensor in self._changing]

    def restore(self, kept: list[Tensor]) -> None:
        """Put a snapshot back."""
        for tensor, copy in zip(self._changing, kept, strict=True):
            tensor.copy_(copy)

    def empty(self) -> None:
        """No request in any slot."""
        self.ints[:, Int.LIVE] = 0

    @property
    def _changing(self) -> list[Tensor]:
        return [self.ints, self.floats, self.lengths, self.stream, self.x, self.reports, self.visit]

    def _places(self, edits: Edits) -> np.ndarray:
        """Places in `tables`, all sequences of all slots in one row, and the pages that come there."""
        _, sequences, width = self.tables.shape
        starts = [(slot * sequences + sequence) * width + number for slot, sequence, number, _ in edits.pages]
        runs = [pages for _, _, _, pages in edits.pages]
        counts = np.fromiter(map(len, runs), np.int64)
        page = np.fromiter(chain.from_iterable(runs), np.int64)
        first = np.array(starts) - counts.cumsum() + counts
        return np.stack([np.repeat(first, counts) + np.arange(len(page)), page])

    def _sent(self, values: Sequence[object] | np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return sent(torch.as_tensor(values, dtype=dtype), self.device)
