"""Attention of routed tokens, forward and backward: over one another, and over shared keys and values.

    python -m bench.attention [--rows 16] [--length 2048]

The heads of a 360M model in bfloat16 on one CUDA device. Dense: k tokens over themselves in causal order, as
recursion-wise keys and values have it. Ranged: k random tokens over all at or before them, as sharing has it. FLOPs are
those of the pairs that are seen. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import milliseconds
from mor.model.ranged_attention import KeyRange

QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 15, 5, 64


def heads(rows: int, count: int, tokens: int) -> Tensor:
    """Random (B, heads, tokens, E) in the memory order of a projection."""
    shape = (rows, tokens, count, HEAD_SIZE)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


def measure(attend: Callable[..., Tensor], inputs: list[Tensor], pairs: float) -> dict[str, float]:
    """Times and TFLOP/s of the forward and the backward pass; `pairs` of a query and a key it sees, per head.

    The backward pass is the time of both less that of the forward: compiled code gives its buffers away in a backward
    pass, which therefore cannot be run again on its own.
    """
    gradient = torch.randn_like(attend(*inputs))
    forward = milliseconds(lambda: attend(*inputs))
    backward = milliseconds(lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)) - forward
    flops = 4 * pairs * QUERY_HEADS * HEAD_SIZE
    return {
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "forward_tflops": round(flops / forward / 1e9, 1),
        "backward_tflops": round(2.5 * flops / backward / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    rows, length = arguments.rows, arguments.length
    lines = []
    for active in (length, 2 * length // 3, length // 3):
        query, *own = (heads(rows, count, active) for count in (QUERY_HEADS, KEY_HEADS, KEY_HEADS))
        dense = measure(causal, [query, *own], rows * active * (active + 1) / 2)
        lines.append({"kind": "dense", "active": active} | dense)
        place_BK = torch.rand(rows, length, device="cuda").topk(active, dim=1).indices.sort(dim=1).values
        keys = KeyRange(None, place_BK, length)
        shared = [heads(rows, KEY_HEADS, length) for _ in range(2)]
        lines.append(
            {"kind": "ranged", "active": active} | measure(keys.attend, [query, *shared], float((place_BK + 1).sum()))
        )
        for line in lines[-2:]:
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    print(json.dumps(dict(benchmark="attention", device=torch.cuda.get_device_name(), torch=torch.__version__,
                          rows=rows, length=length, lines=lines)))  # fmt: skip


def causal(query_BHKE: Tensor, key_BGKE: Tensor, value_BGKE: Tensor) -> Tensor:
    """Dense causal attention with grouped queries."""
    return F.scaled_dot_product_attention(query_BHKE, key_BGKE, value_BGKE, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    main()
