"""Keys and values of a model whose tokens have depths of their own.

Every recursion is a *virtual sequence*: it holds entries only for the tokens that were active there, in causal order,
with a length per row. The unshared layers are one more, with every token. So attention over a cache needs no positions:
a token sees the entries that stand before it.

Legend: B rows, K new tokens of a row, L entries of a row, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from .configuration_mor import MorConfig
from .token_set import TokenSet

_GROWTH = 64


class SlotKeysValues:
    """Keys and values (B, G, capacity, E) of one layer application; entries past a row's length are unused."""

    def __init__(self, key_BGLE: Tensor, value_BGLE: Tensor) -> None:
        self.key_BGLE, self.value_BGLE = key_BGLE, value_BGLE

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.key_BGLE, self.value_BGLE

    def ensure(self, capacity: int) -> None:
        """Grow to hold `capacity` entries, a quarter more at a time so that appending stays linear."""
        have = self.key_BGLE.shape[2]
        if capacity > have:
            extra = max(capacity - have, have // 4, _GROWTH)
            self.key_BGLE, self.value_BGLE = (
                torch.cat((t, t.new_zeros(*t.shape[:2], extra, t.shape[3])), dim=2) for t in self.tensors()
            )

    def write(self, row_index: Tensor | None, place_BK: Tensor, key_BGKE: Tensor, value_BGKE: Tensor) -> None:
        """Put new entries at `place_BK` of the rows."""
        rows = torch.arange(place_BK.shape[0], device=place_BK.device) if row_index is None else row_index
        for buffer, new in ((self.key_BGLE, key_BGKE), (self.value_BGLE, value_BGKE)):
            buffer[rows[:, None], :, place_BK] = new.transpose(1, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.key_BGLE, self.value_BGLE = change(self.key_BGLE), change(self.value_BGLE)


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Places for the K new entries of some rows of a virtual sequence, made once and used by all its layers.

    `length`: entries of the longest of these rows, the new ones included. `is_even`: all these rows have as many.
    `is_fresh`: the sequence was empty and all rows take part, so the new entries are all there is.
    """

    row_index: Tensor | None
    place_BK: Tensor
    length: int
    is_even: bool
    is_fresh: bool


class VirtualSequence:
    """The entries of one recursion (or of the unshared layers): lengths per row, and a slot per layer application."""

    def __init__(self) -> None:
        self.slots: dict[int, SlotKeysValues] = {}
        self.lengths: list[int] = []
        self.number_BL: Tensor | None = None  # each entry's place among the row's real tokens

    def reserve(self, number_BK: Tensor, tokens: TokenSet) -> Reservation:
        """Make room for new tokens, numbered `number_BK` among their rows' real tokens. Reads counts from the
        device.
        """
        batch, size = number_BK.shape
        device = number_BK.device
        counts = [size] * batch if tokens.valid_BK is None else tokens.valid_BK.sum(1).tolist()
        starts = self.lengths or [0] * batch
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        active = [row for row, count in enumerate(counts) if count]
        row_index = None if len(active) == batch else torch.tensor(active, dtype=torch.long, device=device)
        start_B = torch.tensor([starts[row] for row in active], dtype=torch.long, device=device)
        place_BK = start_B[:, None] + torch.arange(size, device=device)
        self._write_numbers(row_index, place_BK, number_BK)
        lengths = {self.lengths[row] for row in active}
        return Reservation(
            row_index=row_index,
            place_BK=place_BK,
            length=max(lengths, default=0),
            is_even=len(lengths) == 1,
            is_fresh=row_index is None and not self.slots and not any(starts),
        )

    def _write_numbers(self, row_index: Tensor | None, place_BK: Tensor, number_BK: Tensor) -> None:
        batch, capacity = number_BK.shape[0], max(self.lengths, default=0) + number_BK.shape[1]
        if self.number_BL is None:
            self.number_BL = number_BK.new_zeros(batch, capacity)
        elif self.number_BL.shape[1] < capacity:
            extra = number_BK.new_zeros(batch, capacity - self.number_BL.shape[1] + _GROWTH)
            self.number_BL = torch.cat((self.number_BL, extra), dim=1)
        rows = torch.arange(batch, device=place_BK.device) if row_index is None else row_index
        self.number_BL[rows[:, None], place_BK] = number_BK if row_index is None else number_BK[row_index]

    def append(self, layer: int, new: tuple[Tensor, Tensor], at: Reservation) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B', G, K, E) and return all entries (B', G, L, E) of the rows taking part."""
        if layer not in self.slots:
            if at.is_fresh:
                self.slots[layer] = SlotKeysValues(*new)
                return new
            batch = len(self.lengths)
            self.slots[layer] = SlotKeysValues(*(t.new_zeros(batch, t.shape[1], 0, t.shape[3]) for t in new))
        slot = self.slots[layer]
        slot.ensure(at.length + at.place_BK.shape[1] - 1)
        slot.write(at.row_index, at.place_BK, *new)
        return self.read(layer, at.row_index, at.length)

    def read(self, layer: int, row_index: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` entries of some rows."""
        key_BGLE, value_BGLE = (t[:, :, :length] for t in self.slots[layer].tensors())
        return (key_BGLE, value_BGLE) if row_index is None else (key_BGLE[row_index], value_BGLE[row_index])

    def entries(self, row_index: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Numbers (B', length) of some rows' entries among the row's real tokens, and which entries are real."""
        assert self.number_BL is not None
        device = self.number_BL.device
        valid_BL = torch.arange(length, device=device) < torch.tensor(self.lengths, device=device)[:, None]
        number_BL = self.number_BL[:, :length]
        return (number_BL, valid_BL) if row_index is None else (number_BL[row_index], valid_BL[row_index])

    def map_rows(self, change: Callable[[Tensor], Tensor], lengths: list[int]) -> None:
        """Replace the rows of everything held by `change` of them."""
        for slot in self.slots.values():
            slot.map(change)
        self.number_BL = None if self.number_BL is None else change(self.number_BL)
        self.lengths = lengths

    def truncate(self, num_tokens: list[int]) -> None:
        """Forget the entries of tokens numbered `num_tokens[row]` and later."""
        if self.number_BL is not None:
            number_BL, valid_BL = self.entries(None, self.number_BL.shape[1])
            limit_B = torch.tensor(num_tokens, device=number_BL.device)
            self.lengths = (valid_BL & (number_BL < limit_B[:, None])).sum(1).tolist()

    def held_bytes(self) -> int:
        """Bytes of the entries held, padding and room for growth left out."""
        return sum(
            sum(self.lengths) * t.shape[1] * t.shape[3] * t.element_size()
            for slot in self.slots.values()
            for t in slot.tensors()
        )


class MorCache(Cache):
    """Cache of a MoR, recursive or vanilla model, for `generate` and for incremental `forward` calls.

    Holds keys and values only where a token was active (`recursion`), only of the first recursion (`shared`), or the
    first recursion's for all and later ones' where active (`hybrid`), as the model's `kv_cache` says.
    """

    def __init__(self, config: MorConfig) -> None:
        super().__init__(layers=[])
        self.unshared = VirtualSequence()
        self.recursions = [VirtualSequence() for _ in range(config.num_recursions)]
        self.num_tokens: list[int] = []  # real tokens seen, per row
        self.num_columns = 0  # columns seen, padding included: what transformers calls the sequence length
        self._columns: list[list[int]] = []  # real tokens of each row in every forward, for `crop`

    def sequence(self, recursion: int | None) -> VirtualSequence:
        """The virtual sequence of a recursion; None is the unshared layers'."""
        return self.unshared if recursion is None else self.recursions[recursion]

    def _sequences(self) -> list[VirtualSequence]:
        return [self.unshared, *self.recursions]

    def advance(self, member_BT: Tensor | None, batch: int, num_columns: int) -> None:
        """Count the columns of a finished forward; `member_BT` marks the real tokens, None means all."""
        start = self.num_columns
        self.num_columns += num_columns
        self.num_tokens = self.num_tokens or [0] * batch
        self._columns = self._columns or [[] for _ in range(batch)]
        masks = [[True] * num_columns] * batch if member_BT is None else member_BT.tolist()
        for row, mask in enumerate(masks):
            self._columns[row].extend(start + i for i, real in enumerate(mask) if real)
            self.num_tokens[row] = len(self._columns[row])

    def kv_bytes(self) -> int:
        """Bytes of the keys and values held: what `cost.kv_bytes` predicts from the tokens' depths."""
        return sum(sequence.held_bytes() for sequence in self._sequences())

    def allocated_bytes(self) -> int:
        """Bytes allocated for keys and values: rows padded to the longest, with room for growth."""
        slots = [slot for sequence in self._sequences() for slot in sequence.slots.values()]
        return sum(t.numel() * t.element_size() for slot in slots for t in slot.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.num_columns + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Of layers as transformers sees them: there is one, and it attends."""
        return [False]

    @property
    def is_initialized(self) -> bool:
        return self.num_columns > 0

    def __len__(self) -> int:
        return sum(len(sequence.slots) for sequence in self._sequences())

    def __repr__(self) -> str:
        lengths = [sequence.lengths for sequence in self._sequences()]
        return f"MorCache(columns={self.num_columns}, unshared={lengths[0]}, recursions={lengths[1:]})"

    def _map_rows(self, change: Callable[[Tensor], Tensor], order: list[int]) -> None:
        for sequence in self._sequences():
            sequence.map_rows(change, [sequence.lengths[row] for row in order] if sequence.lengths else [])
        if self.num_tokens:
            self.num_tokens = [self.num_tokens[row] for row in order]
            self._columns = [list(self._columns[row]) for row in order]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        order = torch.arange(len(self.num_tokens))[indices.cpu()].tolist()
        self._map_rows(lambda t: t.index_select(0, torch.tensor(order, device=t.device)), order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        order = [row for row in range(len(self.num_tokens)) for _ in range(repeats)]
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0), order)

    def crop(self, max_length: int) -> None:
        """Forget columns: keep the first `max_length`, or drop the last `-max_length`."""
        keep = max_length if max_length > 0 else self.num_columns + max_length
        if not 0 <= keep < self.num_columns:
            return
        self._columns = [[column for column in row if column < keep] for row in self._columns]
        self.num_tokens = [len(row) for row in self._columns]
        for sequence in self._sequences():
            sequence.truncate(self.num_tokens)
        self.num_columns = keep

    def reset(self) -> None:
        self.unshared = VirtualSequence()
        self.recursions = [VirtualSequence() for _ in self.recursions]
        self.num_tokens, self._columns, self.num_columns = [], [], 0

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("MorCache is written by the model per recursion, not per layer; pass it to the model")
