"""Slots in random states, and the steps of the C program on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.native.library import open_library
from mor.engine.native.row_steps import RowSteps
from mor.engine.slot_program import geometry_of
from mor.engine.slot_state import NOTHING, RESTING, Float, Int, SlotState
from mor.engine.slot_steps import Geometry
from mor.model.modeling_mor import MorForCausalLM

SLOTS, ENTRIES, LONGEST, PAGES = 60, 3, 60, 500


@dataclass(frozen=True, kw_only=True)
class Slotted:
    state: SlotState
    geometry: Geometry
    steps: RowSteps
    embedding_VD: Tensor


def slotted(model: MorForCausalLM, seed: int = 0) -> Slotted:
    """Slots at all recursions and at none, some of them empty, fresh, inactive or at their limit."""
    try:
        library = open_library()
    except OSError as error:
        pytest.skip(str(error))
    torch.manual_seed(seed)
    config, like = model.config, model.lm_head.weight.detach()
    recursions, hidden = config.num_recursions, config.hidden_size
    layout = PageLayout.of(config, ENTRIES)
    store = KvStore(layout, PAGES, device=like.device, dtype=like.dtype)
    state = SlotState(layout, SLOTS, LONGEST, hidden_size=hidden, most_visits=4, like=like)
    geometry = geometry_of(model, layout, store, state, LONGEST)
    state.tables.copy_(torch.randperm(state.tables.numel()).view(state.tables.shape) % PAGES)
    state.lengths.copy_(torch.randint(0, 20, state.lengths.shape))
    state.x.normal_(), state.stream.normal_()
    store.overlay_RXP.random_(-1, 20)
    state.visit.fill_(2)
    number = torch.arange(SLOTS + 1)
    random = {
        Int.TOKEN: torch.randint(1, config.vocab_size, number.shape),
        Int.NUMBER: torch.randint(20, 40, number.shape),
        Int.RECURSION: number % (recursions + 1) + RESTING,
        Int.ACTIVE: (torch.rand(number.shape) < 0.7).long(),
        Int.DEPTH: torch.randint(0, 3, number.shape),
        Int.LIVE: (torch.rand(number.shape) < 0.8).long(),
        Int.FRESH: (torch.rand(number.shape) < 0.3).long(),
        Int.MADE: torch.randint(0, 9, number.shape),
        Int.LEFT: torch.randint(1, 9, number.shape),
        Int.LIMIT: 1 + number // 4 % recursions,
        Int.SEED: torch.randint(-(2**60), 2**60, number.shape),
    }
    for column, values in random.items():
        state.ints[:, column] = values
    state.ints[:, Int.STOPS :] = NOTHING
    state.ints[::3, Int.STOPS + 2] = 7
    state.floats[:, Float.GATE] = torch.rand(number.shape)
    state.floats[:, Float.THRESHOLDS :] = 0.3 * torch.randn(SLOTS + 1, recursions)
    state.floats[::5, Float.THRESHOLDS :] = -torch.inf
    embedding_VD = model.model.embed_tokens.weight.detach()
    steps = RowSteps(library, state, geometry, embedding_VD)
    return Slotted(state=state, geometry=geometry, steps=steps, embedding_VD=embedding_VD)
