"""The engine's kernels at the dimensions of the 360M model, each in a CUDA graph, beside what they replace.

    python -m bench.kernels [--rows 1,16,64,256]

Attention: one layer's new tokens over their pages, as bytes of keys and values per second beside those of a copy.
Layers: the products of a layer and what stands between them, without attention, by the kernels for few rows and by
cuBLAS with separate kernels, over weights that no cache holds. Draw: the next tokens from 49,152 logits. Without a GPU
the plain twins run on small sizes. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import copy_rate, milliseconds, seconds
from mor.engine.setup import ops_for

HIDDEN, INNER, HEADS, GROUPS, SIZE, ENTRIES = 960, 2560, 15, 5, 64, 16


def microseconds(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Median time of a call; on CUDA of graph replays by device events."""
    if device != "cuda":
        return 1e6 * seconds(run, device) / calls
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * milliseconds(graph.replay) / calls


def attention(ops: Any, rows: int, context: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Rows whose sequences all have `context` entries, on pages in random order."""
    pages = -(-context // ENTRIES)
    pool = torch.randn(rows * pages + 1, 2, ENTRIES, GROUPS, SIZE, device=device, dtype=dtype)
    table = torch.randperm(rows * pages, device=device).view(rows, pages).int()
    row, last = torch.arange(rows, device=device), torch.full((rows,), context - 1, device=device)
    page, place = table[:, (context - 1) // ENTRIES].long(), last % ENTRIES
    qkv = torch.randn(rows, (HEADS + 2 * GROUPS) * SIZE, device=device, dtype=dtype)
    cos, sin = torch.randn(2, rows, SIZE, device=device, dtype=dtype)
    keys, values = pool[:, 0], pool[:, 1]
    taken = microseconds(
        lambda: ops.attend_new(qkv, cos, sin, page, place, keys, values, table, row, last, context, HEADS), device
    )
    moved = rows * context * 2 * GROUPS * SIZE * dtype.itemsize
    return dict(kind="attention", rows=rows, context=context, us=taken, tb_s=moved / taken / 1e6)


def layers(ops: Any, rows: int, count: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A layer without attention: time of the kernels that fold everything in, and of cuBLAS with kernels around it."""
    shapes = ((HEADS + 2 * GROUPS) * SIZE, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)
    weights = [[torch.randn(s, device=device, dtype=dtype) / s[1] ** 0.5 for s in shapes] for _ in range(count)]
    norm, x = torch.ones(HIDDEN, device=device, dtype=dtype), torch.randn(rows, HIDDEN, device=device, dtype=dtype)
    heads = torch.randn(rows, HIDDEN, device=device, dtype=dtype)

    def folded() -> None:
        for qkv, out, both, down in weights:
            ops.linear_small(x, qkv, norm_K=norm, eps=1e-5)
            ops.linear_small(heads, out, onto_NM=x)
            ops.linear_small(ops.linear_small(x, both, norm_K=norm, eps=1e-5, gated=True), down, onto_NM=x)

    def apart() -> None:
        delta: Tensor | None = None
        for qkv, out, both, down in weights:
            F.linear(ops.add_norm(x, delta, norm, 1e-5)[1], qkv)
            _, h = ops.add_norm(x, F.linear(heads, out), norm, 1e-5)
            delta = F.linear(ops.swiglu(F.linear(h, both)), down)

    line: dict[str, Any] = dict(kind="layer", rows=rows, apart_us=microseconds(apart, device, count))
    if rows <= max(ops.FEW_ROWS, 1):
        line["folded_us"] = microseconds(folded, device, count)
    return line


def drawing(ops: Any, rows: int, vocabulary: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Next tokens: greedy, at temperature 0.8, and with top-p 0.9 as well."""
    logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)
    seed, index = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    line: dict[str, Any] = dict(kind="draw", rows=rows)
    for name, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", 0.8, 1.0), ("top_p", 0.8, 0.9)):
        columns = [torch.full((rows,), v, device=device, dtype=torch.float64) for v in (temperature, top_p, 0.0)]
        arguments = columns[0], index, columns[1], columns[2], seed, index
        if device == "cuda" or name == "greedy":
            line[f"{name}_us"] = microseconds(lambda a=arguments: ops.draw_tokens(logits, *a), device)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256,512")
    parser.add_argument("--points", default="1x256,32x256,256x256,512x2048,1024x1024", help="of attention")
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    ops, copy = ops_for(torch.device(device), SIZE), copy_rate(device)
    points = [tuple(map(int, point.split("x"))) for point in arguments.points.split(",")]
    lines = [attention(ops, rows, context, device, dtype) for rows, context in (points if on_cuda else [(2, 40)])]
    for rows in [int(number) for number in arguments.rows.split(",")] if on_cuda else [2]:
        lines.append(layers(ops, rows, 16 if on_cuda else 1, device, dtype))
        lines.append(drawing(ops, rows, 49152 if on_cuda else 500, device, dtype))
    for line in lines:
        print("  ".join(f"{k} {round(v, 2) if isinstance(v, float) else v}" for k, v in line.items()), flush=True)
    name = torch.cuda.get_device_name() if on_cuda else "cpu"
    print(
        json.dumps(dict(benchmark="kernels", device=name, torch=torch.__version__, copy_tb_s=copy / 1e12, lines=lines))
    )


if __name__ == "__main__":
    main()
