"""Runs of layers in one call of the C program: what `mor.engine.layers` does when a visit has few rows on a CPU.

At these sizes PyTorch takes longer to start the thirty operations of a layer than the processor to do them.

Legend: N rows, D hidden size, K input features, M output features, E head size, T tables, X pages of a table.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mor.engine.kv_store import Overlay
from mor.engine.native.library import open_library
from mor.model.configuration_mor import MorConfig

MOST_ROWS = 64
"""With more rows than these a matrix product of PyTorch is faster."""

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_WEIGHTS = "qkv qkv_bias out out_bias gate_up gate_up_bias down down_bias input_norm post_norm keys values".split()
_TENSORS = "layers x cos sin page place table table_row last recursion overlay scratch".split()
_SIZES = (
    "num_layers rows hidden inner heads groups head_size page_entries page_stride table_stride overlay_stride longest "
    "threads"
).split()


class _Layer(ctypes.Structure):
    """See `layers.c`."""

    _fields_: ClassVar = [(name, _POINTER) for name in _WEIGHTS]


class _Run(ctypes.Structure):
    """See `layers.c`."""

    _fields_: ClassVar = [
        *((name, _POINTER) for name in _TENSORS),
        *((name, _INTEGER) for name in _SIZES),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What rows see: entries 0..`last_N` of the pages in `table_TX[row_N]`, or what lies over them; nothing where
    `last_N` is -1. `longest`: a bound on entries that one sees."""

    table_TX: Tensor
    row_N: Tensor
    last_N: Tensor
    longest: int
    overlay: Overlay | None = None


class FewRows:
    """The C program for one model."""

    def __init__(self, config: MorConfig, library: ctypes.CDLL) -> None:
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self._layers, self._linear, self._scratch_size = library.mor_layers, library.mor_linear, library.mor_scratch
        self._linear.argtypes = [_POINTER] * 3 + [_INTEGER] * 4
        self._scratch_size.restype = _INTEGER
        self._draw = library.mor_draw
        self._draw.argtypes = [_POINTER, _INTEGER, _INTEGER, *[_POINTER] * 6, _INTEGER]
        self._heads, self._groups, self._head_size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self._inner, self._eps = config.intermediate_size, config.rms_norm_eps
        self._tables: dict[tuple[int, ...], Any] = {}
        self._scratch = torch.empty(0)

    def layers(
        self,
        weights: Sequence[Any],
        x_ND: Tensor,
        rotary: tuple[Tensor, Tensor],
        page_N: Tensor | None,
        place_N: Tensor,
        seen: Seen,
        pages: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Apply layers one after another: `x_ND` becomes the output, and rows that see nothing stay as they are."""
        key = pages[0][0]
        kept = [x_ND, *(t.contiguous() for t in (*rotary, place_N, seen.table_TX, seen.row_N, seen.last_N))]
        x, cos, sin, place, table, table_row, last = (tensor.data_ptr() for tensor in kept)
        page_N = None if page_N is None else page_N.contiguous()
        recursion_N, entry_RXP = (t.contiguous() for t in seen.overlay) if seen.overlay else (None, None)
        run = _Run(
            layers=ctypes.addressof(self._table(weights, pages)),
            x=x,
            cos=cos,
            sin=sin,
            page=None if page_N is None else page_N.data_ptr(),
            place=place,
            table=table,
            table_row=table_row,
            last=last,
            recursion=None if recursion_N is None else recursion_N.data_ptr(),
            overlay=None if entry_RXP is None else entry_RXP.data_ptr(),
            num_layers=len(weights),
            rows=x_ND.shape[0],
            hidden=x_ND.shape[1],
            inner=self._inner,
            heads=self._heads,
            groups=self._groups,
            head_size=self._head_size,
            page_entries=key.shape[1],
            page_stride=key.stride(0),
            table_stride=seen.table_TX.shape[1],
            overlay_stride=0 if entry_RXP is None else entry_RXP.stride(0),
            longest=seen.longest,
            threads=torch.get_num_threads(),
            eps=self._eps,
        )
        size = self._scratch_size(ctypes.byref(run))
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        run.scratch = self._scratch.data_ptr()
        self._layers(ctypes.byref(run))

    def linear(self, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        """x times the transpose of the weight: (N, M)."""
        x_NK, out_NM = x_NK.contiguous(), x_NK.new_empty(len(x_NK), len(weight_MK))
        sizes = (*x_NK.shape, len(weight_MK), torch.get_num_threads())
        self._linear(x_NK.data_ptr(), weight_MK.data_ptr(), out_NM.data_ptr(), *sizes)
        return out_NM

    def draw(self, logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (N,), -1 where there is none to choose, and the log-probabilities the model gave them, as
        `mor.engine.sampler` has them without filters and penalties."""
        (rows, size), threads = logits_NV.shape, torch.get_num_threads()
        kept = [t.contiguous() for t in (logits_NV, temperature_N, seed_N, index_N)]
        logits, *decisive = (tensor.data_ptr() for tensor in kept)
        scratch = torch.empty(threads * size, dtype=torch.int64)
        token_N, logprob_N = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        results = scratch.data_ptr(), token_N.data_ptr(), logprob_N.data_ptr()
        self._draw(logits, rows, size, *decisive, *results, threads)
        return token_N, logprob_N

    def _table(self, weights: Sequence[Any], pages: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """The weights and pages of a run of layers, made once."""
        key = *map(id, weights), *(keys.data_ptr() for keys, _ in pages)
        if key not in self._tables:
            rows = [_pointers(layer, keys, values) for layer, (keys, values) in zip(weights, pages, strict=True)]
            self._tables[key] = (_Layer * len(rows))(*rows)
        return self._tables[key]


def _pointers(layer: Any, keys: Tensor, values: Tensor) -> _Layer:
    tensors = dict(
        qkv=layer.qkv,
        qkv_bias=layer.qkv_bias,
        out=layer.out.weight,
        out_bias=layer.out.bias,
        gate_up=layer.gate_up,
        gate_up_bias=layer.gate_up_bias,
        down=layer.down.weight,
        down_bias=layer.down.bias,
        input_norm=layer.input_norm,
        post_norm=layer.post_norm,
    )
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    return _Layer(**pointers, keys=keys.data_ptr(), values=values.data_ptr())


def few_rows_for(config: MorConfig, device: torch.device, dtype: torch.dtype, wanted: bool | None) -> FewRows | None:
    """The C program, if the model is one for it. `wanted`: None if it need not be there.

    Raises ValueError naming why it is not there although it is wanted.
    """
    if wanted is False:
        return None
    fits = device.type == "cpu" and dtype == torch.float32 and config.hidden_act in ("silu", "swish")
    try:
        if not fits:
            raise OSError(
                f"it is for float32 on a CPU with silu, not {dtype} on {device.type} with {config.hidden_act}"
            )
        return FewRows(config, open_library())
    except OSError as error:
        if wanted:
            raise ValueError(f"native=True: {error}") from error
        if fits:
            warnings.warn(f"layers run in PyTorch alone, which is slower: {error}", stacklevel=2)
        return None
