"""Repairs of Triton's interpreter, as of Triton 3.6: bounds of loops under NumPy 2.4, and bfloat16.

The interpreter keeps bfloat16 as its 16 bits; it multiplies matrices of these bits, and rounds to them towards zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, the even one of two."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair the interpreter until the end of the test."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patched_cast(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(source.data), target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(rounded(source.data), target.scalar)
        return cast(self, source, target)

    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(widened(each.data), tl.float32) if each.dtype.scalar == tl.bfloat16 else each
            for each in (a, b)
        ]
        return dot(self, *wide, *rest)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    monkeypatch.setattr(builder, "cast_impl", patched_cast)
    monkeypatch.setattr(builder, "create_dot", patched_dot)
    for name in ("create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, patched_cast)
