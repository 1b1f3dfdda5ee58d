"""What an engine is built from: pages, limits, slots, and the tokens that end a text."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mor.engine.budgets import Budgets
from mor.engine.kv_store import KvStore, PageLayout
from mor.engine.layers import Layers
from mor.engine.limits import Limits
from mor.engine.options import EngineOptions
from mor.engine.slots import Slots
from mor.engine.visit_pace import VisitPace
from mor.model.modeling_mor import MorForCausalLM

VISITS_ON_CPU = 8
"""Visits of a batch on a CPU, at most: it ends when a request does, or after `slot_runner.BATCH_SECONDS`."""


def end_tokens(model: MorForCausalLM, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's generation settings or the tokenizer name them."""
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    if named is None:
        named = getattr(tokenizer, "eos_token_id", None)
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)


def check_weights(model: MorForCausalLM, embedding_VD: Tensor) -> None:
    """Raises ValueError if the model's weights were replaced since it had this embedding."""
    now = model.model.embed_tokens.weight
    if now.data_ptr() != embedding_VD.data_ptr():
        raise ValueError(
            f"the model's weights, {now.dtype} on {now.device}, are no longer those that this engine was built on, "
            f"{embedding_VD.dtype} on {embedding_VD.device}; build another engine"
        )


def choose_num_pages(options: EngineOptions, page_bytes: int, device: torch.device) -> int:
    """Pages of the pool: as given, or what its memory holds. Raises ValueError if that is none."""
    if options.num_pages is not None:
        return options.num_pages
    memory = 2**30 if options.kv_memory_gib is None else options.kv_memory_gib * 2**30
    if options.kv_memory_gib is None and device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] * options.memory_share
    if memory < page_bytes:
        raise ValueError(f"{memory / 2**20:.1f} MiB hold no page of {page_bytes / 2**20:.1f} MiB; raise kv_memory_gib")
    return int(memory // page_bytes)


def limits_of(options: EngineOptions, model: MorForCausalLM) -> Limits:
    """How much at once. Raises ValueError for a length that the model does not have."""
    most = int(model.config.max_position_embeddings)
    if options.max_length is not None and options.max_length > most:
        raise ValueError(f"max_length={options.max_length} exceeds the model's max_position_embeddings={most}")
    on_cuda = model.device.type == "cuda"
    return Limits(
        max_requests=options.max_requests,
        max_visit_tokens=options.max_visit_tokens or (8192 if on_cuda else 512),
        prefill_chunk=options.prefill_chunk or (1024 if on_cuda else 256),
        max_length=options.max_length or most,
        room_to_grow=options.tokens_to_grow,
    )


def slots_of(
    model: MorForCausalLM,
    layout: PageLayout,
    store: KvStore,
    budgets: Budgets,
    layers: Layers,
    options: EngineOptions,
    limits: Limits,
) -> Slots | None:
    """Slots if they are asked for, or if there are kernels for them. Raises ValueError if the model cannot have any."""
    wanted = layers.ops.attend_spans is not None or layers.saves_rows if options.slots is None else options.slots
    if not wanted:
        return None
    most = limits.max_requests
    try:
        return Slots(
            model,
            layout,
            store,
            budgets,
            num_slots=most,
            pace=_pace(model.device, options, most),
            max_length=limits.max_length,
            layers=layers,
            lockstep=options.lockstep,
        )
    except ValueError:
        if options.slots:
            raise
        return None


def _pace(device: torch.device, options: EngineOptions, most_requests: int) -> VisitPace:
    """A fixed number of visits where it is asked for and where the host waits for each anyway."""
    if options.slot_visits is not None or device.type == "cpu":
        visits = options.slot_visits or VISITS_ON_CPU
        return VisitPace(visits, visits)
    if most_requests <= 512:
        return VisitPace(8 if most_requests <= 64 else 16)
    return VisitPace(32, first=16)


def ops_for(device: torch.device, head_size: int) -> ModuleType:
    """What layers are made of: kernels on CUDA if they can read heads of this size, else plain PyTorch."""
    readable = head_size >= 16 and head_size & (head_size - 1) == 0
    has_kernels = device.type == "cuda" and readable and find_spec("triton") is not None
    return import_module("mor.engine.kernels.ops" if has_kernels else "mor.engine.plain_ops")
