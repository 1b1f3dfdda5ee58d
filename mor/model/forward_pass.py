"""What a single forward carries from layer to layer: rotary positions, the cache, and who may see whom.

Legend: B rows, T tokens of a row in this forward (padding removed), K active tokens, L keys, E head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import AttentionScope, KeysValues
from .cache import MorCache, Reservation, VirtualSequence
from .depth_plan import DepthPlan, KvPolicy
from .ranged_attention import KeyRange, document_starts
from .token_set import TokenSet

Read = Callable[[int], tuple[Tensor, Tensor]]


class OwnKeysValues:
    """Keys and values of the visit's own tokens, kept nowhere."""

    projects = True

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        assert own is not None
        return own


class CachedKeysValues:
    """Keys and values of the visit's own tokens behind those that a cache already holds."""

    projects = True

    def __init__(self, sequence: VirtualSequence, at: Reservation) -> None:
        self._sequence, self._at = sequence, at

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        assert own is not None
        return self._sequence.append(layer, own, self._at)


class RememberedKeysValues:
    """The first recursion's, when there is no cache: kept until the forward ends, for the later recursions."""

    projects = True

    def __init__(self) -> None:
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        assert own is not None
        self.slots[layer] = own
        return own


class SharedKeysValues:
    """The first recursion's keys and values; nothing is projected (arXiv 2507.10524, recursive KV sharing)."""

    projects = False

    def __init__(self, first: Read) -> None:
        self._first = first

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        return self._first(layer)


class HybridKeysValues:
    """Own keys and values at the tokens this recursion visited, the first recursion's elsewhere.

    `number_BL`: which of the first recursion's entries each own entry replaces; `valid_BL`: which own entries are real.
    """

    projects = True

    def __init__(self, kept: KeysValues, first: Read, number_BL: Tensor, valid_BL: Tensor | None) -> None:
        self._kept, self._first, self._number_BL, self._valid_BL = kept, first, number_BL, valid_BL

    def __call__(self, layer: int, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        kept, first = self._kept(layer, own), self._first(layer)
        return self._overlay(first[0], kept[0]), self._overlay(first[1], kept[1])

    def _overlay(self, first_BGTE: Tensor, own_BGLE: Tensor) -> Tensor:
        size = first_BGTE.shape[2]
        number_BL = self._number_BL
        if self._valid_BL is not None:
            number_BL = number_BL.masked_fill(~self._valid_BL, size)
        index = number_BL[:, None, :, None].expand_as(own_BGLE)
        return F.pad(first_BGTE, (0, 0, 0, 1)).scatter(2, index, own_BGLE.to(first_BGTE.dtype))[:, :, :size]


class ForwardPass:
    """One forward over B rows of T tokens.

    `tokens`: which of the T places are real (rows may be shorter). `number_BT`: each token's place among its row's real
    tokens, earlier forwards included. `column_BT`: its column in the input, None if no padding was removed.
    `document_BT`: attention stays inside a document; not with a cache.
    """

    def __init__(
        self,
        *,
        plan: DepthPlan,
        policy: KvPolicy,
        rotary: tuple[Tensor, Tensor],
        tokens: TokenSet,
        number_BT: Tensor,
        column_BT: Tensor | None,
        cache: MorCache | None,
        document_BT: Tensor | None,
    ) -> None:
        self.plan, self.policy, self.tokens, self.number_BT = plan, policy, tokens, number_BT
        self.column_BT = column_BT
        self._rotary, self._cache = rotary, cache
        self._start_BT = None if document_BT is None else document_starts(document_BT)
        self._remembered = RememberedKeysValues()

    @property
    def first_serves_all(self) -> bool:
        """Whether the first recursion's keys and values stand for all tokens, so that it must run on all of them."""
        return self.policy != "recursion"

    def scope(self, recursion: int | None, active: TokenSet) -> AttentionScope:
        """What `active` tokens see at a recursion (0-based), or in the unshared layers (None)."""
        build = self._uncached_scope if self._cache is None else self._cached_scope
        return build(recursion, active)

    def _uncached_scope(self, recursion: int | None, active: TokenSet) -> AttentionScope:
        cos_BKE, sin_BKE = (active.gather(t) for t in self._rotary)
        keys_values: KeysValues = OwnKeysValues()
        reads_first = recursion not in (None, 0) and self.first_serves_all
        if recursion == 0 and self.first_serves_all:
            keys_values = self._remembered
        elif reads_first:
            keys_values = SharedKeysValues(self._read_remembered)
            if self.policy == "hybrid":
                number_BK = active.places(self.number_BT.shape, self.number_BT.device)
                keys_values = HybridKeysValues(OwnKeysValues(), self._read_remembered, number_BK, active.valid_BK)
        return AttentionScope(
            cos_BKE=cos_BKE,
            sin_BKE=sin_BKE,
            keys_values=keys_values,
            key_range=self._key_range(active, reads_first),
        )

    def _read_remembered(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._remembered.slots[self.plan.first_applications[layer]]

    def _key_range(self, active: TokenSet, reads_first: bool) -> KeyRange | None:
        """What `active` tokens see of each other, or of all tokens; None for plain causal order.

        An absent place sees itself at least; whom it sees does not matter, and no real one sees it.
        """
        shape, device = self.number_BT.shape, self.number_BT.device
        if self._start_BT is None:
            return KeyRange(None, active.index_BK, shape[1]) if reads_first and active.index_BK is not None else None
        start_BK = active.gather(self._start_BT)
        if reads_first:
            return KeyRange(start_BK, active.places(shape, device), shape[1])
        own_BK = torch.arange(start_BK.shape[1], device=device).expand_as(start_BK)
        return KeyRange(document_starts(start_BK), own_BK, start_BK.shape[1])

    def _cached_scope(self, recursion: int | None, active: TokenSet) -> AttentionScope:
        assert self._cache is not None
        if recursion is None or recursion == 0 or self.policy == "recursion":
            return self._own_scope(self._cache.sequence(recursion), active)
        first = self._cache.sequence(0)
        if self.policy == "hybrid":
            return self._hybrid_scope(first, self._cache.sequence(recursion), active)
        return self._shared_scope(first, active)

    def _own_scope(self, sequence: VirtualSequence, active: TokenSet) -> AttentionScope:
        at = sequence.reserve(active.gather(self.number_BT), active)
        cos_BKE, sin_BKE = self._rotary_rows(active, at.row_index)
        sees_all = at.place_BK.shape[1] == 1 and at.is_even
        mask_BKL = None
        if not at.is_fresh and not sees_all:
            mask_BKL = KeyRange(None, at.place_BK, at.length).mask_BKL
        return AttentionScope(
            cos_BKE=cos_BKE,
            sin_BKE=sin_BKE,
            keys_values=CachedKeysValues(sequence, at),
            mask_BKL=mask_BKL,
            is_causal=at.is_fresh,
            row_index=at.row_index,
        )

    def _rotary_rows(self, active: TokenSet, row_index: Tensor | None) -> tuple[Tensor, Tensor]:
        cos, sin = (active.gather(t) for t in self._rotary)
        if row_index is None or cos.shape[0] == 1:
            return cos, sin
        return cos[row_index], sin[row_index]

    def _shared_scope(self, first: VirtualSequence, active: TokenSet) -> AttentionScope:
        row_index = active.active_rows()
        length = max(first.lengths)
        return self._first_scope(active, row_index, length, SharedKeysValues(self._reader(first, row_index, length)))

    def _hybrid_scope(self, first: VirtualSequence, own: VirtualSequence, active: TokenSet) -> AttentionScope:
        at = own.reserve(active.gather(self.number_BT), active)
        length = max(first.lengths)
        number_BL, valid_BL = own.entries(at.row_index, at.length if not at.is_fresh else at.place_BK.shape[1])
        keys_values = HybridKeysValues(
            CachedKeysValues(own, at), self._reader(first, at.row_index, length), number_BL, valid_BL
        )
        return self._first_scope(active, at.row_index, length, keys_values)

    def _first_scope(
        self, active: TokenSet, row_index: Tensor | None, length: int, keys_values: KeysValues
    ) -> AttentionScope:
        """Scope over the first recursion's entries, of which a token sees those numbered up to its own."""
        number_BK = active.gather(self.number_BT)
        number_BK = number_BK if row_index is None else number_BK[row_index]
        mask_BKL = KeyRange(None, number_BK, length).mask_BKL
        cos_BKE, sin_BKE = self._rotary_rows(active, row_index)
        return AttentionScope(
            cos_BKE=cos_BKE, sin_BKE=sin_BKE, keys_values=keys_values, mask_BKL=mask_BKL, row_index=row_index
        )

    def _reader(self, first: VirtualSequence, row_index: Tensor | None, length: int) -> Read:
        def read(layer: int) -> tuple[Tensor, Tensor]:
            return first.read(self.plan.first_applications[layer], row_index, length)

        return read
