"""Runs of layers in one call of the C program: what `mor.engine.layers` does when a visit has few rows on a CPU.

At these sizes PyTorch takes longer to start the thirty operations of a layer than the processor to do them.

Legend: N rows, D hidden size, V vocabulary, E head size, T tables, X pages of a table.
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
        self.library = library
        self._layers, self._logits, self._scratch_size = library.mor_layers, library.mor_logits, library.mor_scratch
        self._logits.argtypes = [*[_POINTER] * 5, *[_INTEGER] * 4, ctypes.c_float]
        self._scratch_size.restype = _INTEGER
        self._draw = library.mor_draw
        self._draw.argtypes = [_POINTER, _INTEGER, _INTEGER, *[_POINTER] * 6, _INTEGER]
        self._sizes = dict(
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_size=config.head_dim,
        )
        self._eps = config.rms_norm_eps
        self._tables: dict[tuple[int, ...], Any] = {}
        self._kept: list[dict[str, Tensor]] = []
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
    ) -> PreparedRun:
        """Layers one after another: `x_ND` becomes the output, and rows that see nothing stay as they are."""
        keys, overlay = pages[0][0], seen.overlay
        tensors = dict(
            x=x_ND,
            cos=rotary[0],
            sin=rotary[1],
            page=page_N,
            place=place_N,
            table=seen.table_TX,
            table_row=seen.row_N,
            last=seen.last_N,
            recursion=overlay.recursion_N if overlay else None,
            overlay=overlay.entry_RXP if overlay else None,
        )
        assert x_ND.is_contiguous()
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        run = _Run(
            layers=ctypes.addressof(self._table(weights, pages)),
            **{name: tensor.data_ptr() for name, tensor in kept.items()},
            num_layers=len(weights),
            rows=x_ND.shape[0],
            hidden=x_ND.shape[1],
            page_entries=keys.shape[1],
            page_stride=keys.stride(0),
            table_stride=seen.table_TX.shape[1],
            overlay_stride=kept["overlay"].stride(0) if overlay else 0,
            longest=seen.longest,
            **self._sizes,
            eps=self._eps,
        )
        return PreparedRun(self, run, kept)

    def apply(self, run: _Run) -> None:
        """Do a run."""
        run.threads = torch.get_num_threads()
        run.scratch = self._room(self._scratch_size(ctypes.byref(run)))
        self._layers(ctypes.byref(run))

    def logits(self, x_ND: Tensor, norm_D: Tensor, weight_VD: Tensor) -> Tensor:
        """The norm of x times the transpose of the weight: (N, V)."""
        x_ND, logits_NV = x_ND.contiguous(), x_ND.new_empty(len(x_ND), len(weight_VD))
        self.write_logits(len(x_ND), *(t.data_ptr() for t in (x_ND, norm_D, weight_VD, logits_NV)), *weight_VD.shape)
        return logits_NV

    def write_logits(self, rows: int, x: int, norm: int, weight: int, logits: int, size: int, hidden: int) -> None:
        """The same, from and to where these numbers point."""
        scratch = self._room(rows * hidden)
        self._logits(x, norm, weight, scratch, logits, rows, hidden, size, torch.get_num_threads(), self._eps)

    def draw(self, logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (N,), -1 where there is none to choose, and the log-probabilities the model gave them, as
        `mor.engine.sampler` has them without filters and penalties."""
        rows, size = logits_NV.shape
        kept = [t.contiguous() for t in (logits_NV, temperature_N, seed_N, index_N)]
        token_N, logprob_N = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self.write_tokens(rows, size, *(tensor.data_ptr() for tensor in (*kept, token_N, logprob_N)))
        return token_N, logprob_N

    def write_tokens(
        self, rows: int, size: int, logits: int, temperature: int, seed: int, index: int, tokens: int, logprobs: int
    ) -> None:
        """The same, from and to where these numbers point."""
        threads = torch.get_num_threads()
        scratch = self._room(2 * threads * size)
        self._draw(logits, rows, size, temperature, seed, index, scratch, tokens, logprobs, threads)

    def _room(self, floats: int) -> int:
        """Memory for so many floats until the next call."""
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        return self._scratch.data_ptr()

    def _table(self, weights: Sequence[Any], pages: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """The weights and pages of a run of layers, made once."""
        key = *map(id, weights), *(keys.data_ptr() for keys, _ in pages)
        if key not in self._tables:
            rows = [_tensors(layer, *own) for layer, own in zip(weights, pages, strict=True)]
            self._kept += rows
            self._tables[key] = (_Layer * len(rows))(*map(_pointers, rows))
        return self._tables[key]


class PreparedRun:
    """A run of layers on rows that lie in the same place each time."""

    def __init__(self, program: FewRows, run: _Run, kept: Any) -> None:
        """`kept`: what the run points to."""
        self._program, self._run, self._kept = program, run, kept

    def __call__(self, rows: int, longest: int) -> None:
        """Apply it to the first `rows` of them, of which none sees more than `longest` entries."""
        self._run.rows, self._run.longest = rows, longest
        self._program.apply(self._run)


class PreparedDraw:
    """Head and draw of up to `MOST_ROWS` rows that lie in the same place each time, and so do their tokens."""

    def __init__(
        self,
        program: FewRows,
        norm_D: Tensor,
        weight_VD: Tensor,
        x_ND: Tensor,
        drawn_by: tuple[Tensor, Tensor, Tensor],
        drawn: tuple[Tensor, Tensor],
    ) -> None:
        """`drawn_by`, `drawn`: arguments and results of `FewRows.draw`."""
        norm_D, weight_VD = norm_D.detach(), weight_VD.detach()
        self._program, self._sizes = program, weight_VD.shape
        logits_NV = x_ND.new_empty(min(len(x_ND), MOST_ROWS), len(weight_VD))
        self._kept = x_ND, norm_D, weight_VD, logits_NV, *drawn_by, *drawn
        self._pointers = [tensor.data_ptr() for tensor in self._kept]

    def __call__(self, rows: int) -> None:
        """Draw tokens of the first `rows`."""
        self._program.write_logits(rows, *self._pointers[:4], *self._sizes)
        self._program.write_tokens(rows, self._sizes[0], *self._pointers[3:])


def _tensors(layer: Any, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """What a layer points to, none of it freed while this is kept, whatever becomes of the model."""
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
    there = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    assert all(tensor.is_contiguous() for tensor in there.values())
    return dict(**there, keys=keys, values=values)


def _pointers(tensors: dict[str, Tensor]) -> _Layer:
    return _Layer(**{name: tensor.data_ptr() for name, tensor in tensors.items()})


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
