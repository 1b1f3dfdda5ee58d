"""The steps of `slots.c` on the slots of one engine, and the rows that they share with layers, router and draw.

Legend: S slots, N rows of a step, D hidden size, E head size, V vocabulary, R recursions, T rows of the table, X pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mor.engine.kv_store import Overlay
from mor.engine.native.few_rows import Seen
from mor.engine.slot_state import NUM_STOPS, Float, Int, Report, SlotState
from mor.engine.slot_steps import Geometry

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_ACTIVATIONS = ("identity", "sigmoid", "tanh")


def _fields(pointers: str, integers: str = "") -> list[tuple[str, Any]]:
    of_tensors = [(name, _POINTER) for name in pointers.split()]
    return of_tensors + [(name, _INTEGER) for name in integers.split()]


class _State(ctypes.Structure):
    """See `slots.c`, as for the others here."""

    _fields_: ClassVar = _fields(
        "token number recursion active depth live fresh made left limit seed top_k stops "
        "gate temperature top_p min_p thresholds report_token report_depth report_logprob "
        "visit lengths tables stream x",
        "column_stride num_stops float_stride report_stride sequences table_stride",
    )


class _Geometry(ctypes.Structure):
    _fields_: ClassVar = _fields(
        "embeddings cos sin overlay",
        "hidden head_size recursions nobodys block_entries outer_entries taken reads_first writes_own overlay_stride",
    )


class _Rows(ctypes.Structure):
    _fields_: ClassVar = _fields("slot x stream token logprob temperature seed made goes_on gate", "count limited")


class _Step(ctypes.Structure):
    _fields_: ClassVar = _fields("state geometry rows")


class _Placed(ctypes.Structure):
    _fields_: ClassVar = _fields("cos sin page place table_row last recursion")


class _Router(ctypes.Structure):
    _fields_: ClassVar = [
        *_fields("heads auxiliary", "activation weighted"),
        ("alpha", ctypes.c_float),
        ("temperature", ctypes.c_float),
    ]


_Kind = TypeVar("_Kind", bound=ctypes.Structure)


def _struct(kind: type[_Kind], tensors: Mapping[str, Tensor | None], **values: float) -> _Kind:
    """Of pointers to tensors, which whoever holds it must keep, and of numbers."""
    return kind(**{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}, **values)


class RowRouter:
    """How the C program decides: see `Router` in `slots.c`."""

    def __init__(
        self,
        heads: Sequence[Tensor] = (),
        auxiliary: Sequence[Tensor] = (),
        *,
        activation: str = "identity",
        alpha: float = 1.0,
        temperature: float = 1.0,
        is_weighted: bool = False,
    ) -> None:
        """`heads`, `auxiliary`: weights of D numbers, one for each recursion, which are read where they are."""
        assert all(weight.is_contiguous() for weight in (*heads, *auxiliary))
        self._kept = heads, auxiliary
        self._tables = [(_POINTER * len(weights))(*(w.data_ptr() for w in weights)) for weights in self._kept]
        self.struct = _Router(
            *(ctypes.addressof(table) if len(table) else None for table in self._tables),
            activation=_ACTIVATIONS.index(activation),
            weighted=is_weighted,
            alpha=alpha,
            temperature=temperature,
        )
        self.pointer = ctypes.addressof(self.struct)


class RowPlaces:
    """Where up to `most` rows find keys and values: see `layers.Placement`."""

    def __init__(self, most: int, geometry: Geometry, table_TX: Tensor, overlay_RXP: Tensor | None = None) -> None:
        cos_NE, sin_NE = geometry.cos_LE.new_empty(2, most, geometry.cos_LE.shape[1])
        page_N, place_N, row_N, last_N, recursion_N = torch.zeros(5, most, dtype=torch.int64)
        self.rotary, self.page_N, self.place_N = (cos_NE, sin_NE), page_N, place_N
        overlay = None if overlay_RXP is None else Overlay(recursion_N, overlay_RXP)
        self.seen = Seen(table_TX=table_TX, row_N=row_N, last_N=last_N, longest=1, overlay=overlay)
        self._recursion_N = recursion_N
        rows = dict(page=page_N, place=place_N, table_row=row_N, last=last_N, recursion=recursion_N)
        self.struct = _struct(_Placed, dict(cos=cos_NE, sin=sin_NE, **rows))
        self.pointer = ctypes.addressof(self.struct)


class RowSteps:
    """A step's rows, and the steps, which are functions of `slots.c`.

    The first of `slot_N` (S,) are the slots of the step, and the first of the others belong to these: see `Rows` there.
    """

    def __init__(self, library: ctypes.CDLL, state: SlotState, geometry: Geometry, embedding_VD: Tensor) -> None:
        most, hidden = state.num_slots, embedding_VD.shape[1]
        whole = torch.zeros(5, most, dtype=torch.int64)
        self.slot_N, self.token_N, self.seed_N, self.made_N, self.goes_on_N = whole
        self.x_ND, self.stream_ND = torch.zeros(2, most, hidden, dtype=torch.float32)
        self.logprob_N, self.gate_N = torch.zeros(2, most, dtype=torch.float32)
        self.temperature_N = torch.zeros(most, dtype=torch.float64)
        names = "slot token logprob temperature seed made goes_on gate".split()
        rows = {name: getattr(self, f"{name}_N") for name in names}
        self._rows = _struct(_Rows, dict(x=self.x_ND, stream=self.stream_ND, **rows))
        embedding_VD = embedding_VD.detach()
        self._kept = state, geometry, embedding_VD
        self._parts = _state_struct(state), _geometry_struct(geometry, embedding_VD), self._rows
        self._step = _Step(*map(ctypes.addressof, self._parts))
        count, act = (partial(_function, library, ctypes.addressof(self._step), kind) for kind in (_INTEGER, None))
        self.finishing, self.entering = count("finishing", _INTEGER), count("entering", _INTEGER)
        self.going, self.sampled = count("going", _INTEGER), count("sampled")
        self.placed_outside = count("placed_outside", _POINTER)
        self.placed_inside = count("placed_inside", _POINTER, _INTEGER)
        self.begun, self.merged = act("begun", _POINTER), act("merged", _POINTER)
        self.entered, self.settled = act("entered"), act("settled")

    @property
    def is_limited(self) -> bool:
        """Whether any of the rows that finish is drawn with a filter."""
        return bool(self._rows.limited)


def _function(library: ctypes.CDLL, step: int, kind: Any, name: str, *arguments: Any) -> Callable[..., int]:
    function = library[f"mor_{name}"]
    function.argtypes, function.restype = [_POINTER, *arguments], kind
    return partial(function, step)


def _state_struct(state: SlotState) -> _State:
    reports = {f"report_{column.name.lower()}": state.reports[:, column] for column in Report}
    integers = {column.name.lower(): state.ints[:, column] for column in Int if column != Int.TARGET}
    floats = {column.name.lower(): state.floats[:, column] for column in Float}
    whole = dict(visit=state.visit, lengths=state.lengths, tables=state.tables, stream=state.stream, x=state.x)
    _, sequences, width = state.tables.shape
    return _struct(
        _State,
        reports | integers | floats | whole,
        column_stride=state.ints.stride(1),
        num_stops=NUM_STOPS,
        float_stride=state.floats.stride(0),
        report_stride=state.reports.stride(0),
        sequences=sequences,
        table_stride=width,
    )


def _geometry_struct(geometry: Geometry, embedding_VD: Tensor) -> _Geometry:
    overlay = geometry.overlay_RXP
    return _struct(
        _Geometry,
        dict(embeddings=embedding_VD, cos=geometry.cos_LE, sin=geometry.sin_LE, overlay=overlay),
        hidden=embedding_VD.shape[1],
        head_size=geometry.cos_LE.shape[1],
        recursions=geometry.num_recursions,
        nobodys=geometry.nobodys,
        block_entries=geometry.block_entries,
        outer_entries=geometry.outer_entries,
        taken=geometry.taken,
        reads_first=geometry.reads_first,
        writes_own=geometry.writes_own,
        overlay_stride=0 if overlay is None else overlay.stride(0),
    )
