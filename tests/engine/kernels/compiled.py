"""Compiles the kernels for compute capability 9.0, which needs no GPU, and prints what the machine code is made of.

A script of its own, since Triton's interpreter, under which the other tests run, takes the compiler's place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mor.engine.kernels import (
    append_decode,
    draw,
    draw_limits,
    few_rows,
    fused,
    paged_decode,
    paged_prefill,
    slot_kernels,
    some_rows,
)

HEADS = dict(HEADS=15, GROUP=3, SIZE=64, ENTRIES=16)
NO_OVERLAY = dict.fromkeys(("recursion_N", "recursion_M", "recursion_AN", "overlay_RXP"))
EARLY = dict(launch_pdl=True)
LINEAR = dict(N=1, PAD_N=1, BLOCK_C=256, BLOCK_F=4, bias_M=None, EARLY=2, MOST=3072, W=4)
SOME = dict(EARLY=2, FETCHES=True, PAD_N=16, BLOCK_F=16, SLICES=8, BLOCK_C=64, bias_M=None)
DECODE = dict(TILE_ENTRIES=paged_decode.TILE, SPLIT_ENTRIES=paged_decode.SPLIT, BLOCK_H=16, EARLY=2, LINE=64)
DRAW = dict(SIZE=49152, BLOCK_B=draw.BLOCK, EARLY=True)
COLUMNS = dict(NUM_INTS=21, NUM_FLOATS=7, BLOCK_I=32, HIDDEN=960, BLOCK_D=1024)
PLACES = dict(WIDTH=132, ENTRIES=80, SIZE=64, BLOCK_E=64)
ENTER = dict(SEQUENCES=4, OVERLAYING=0)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "attend_split": (
        paged_decode._attend_split,
        HEADS | DECODE | NO_OVERLAY,
        dict(num_warps=paged_decode.NUM_WARPS, num_stages=paged_decode.NUM_STAGES, enable_fp_fusion=False) | EARLY,
    ),
    "attend_split_overlaid": (
        paged_decode._attend_split,
        HEADS | DECODE,
        dict(num_warps=paged_decode.NUM_WARPS, num_stages=paged_decode.NUM_STAGES, enable_fp_fusion=False) | EARLY,
    ),
    "attend_new": (
        append_decode._attend_new,
        HEADS | DECODE | NO_OVERLAY,
        dict(num_warps=paged_decode.NUM_WARPS, num_stages=paged_decode.FEW_STAGES, enable_fp_fusion=False) | EARLY,
    ),
    "attend_new_wide": (
        append_decode._attend_new,
        HEADS | DECODE | NO_OVERLAY | dict(TILE_ENTRIES=paged_decode.WIDEST),
        dict(num_warps=paged_decode.WIDE_WARPS, num_stages=paged_decode.FEW_STAGES, enable_fp_fusion=False) | EARLY,
    ),
    "attend_new_overlaid": (
        append_decode._attend_new,
        HEADS | DECODE,
        dict(num_warps=paged_decode.NUM_WARPS, num_stages=paged_decode.FEW_STAGES, enable_fp_fusion=False) | EARLY,
    ),
    "join_splits": (
        paged_decode._join_splits,
        dict(HEADS=15, GROUP=3, SIZE=64, SPLIT_ENTRIES=paged_decode.SPLIT, BLOCK_K=8, BLOCK_H=4, EARLY=True),
        EARLY | dict(num_warps=2),
    ),
    "attend_tile": (
        paged_prefill._attend_tile,
        HEADS | NO_OVERLAY | dict(BLOCK_R=128, BLOCK_L=paged_prefill.BLOCK_ENTRIES),
        dict(num_warps=paged_prefill.NUM_WARPS, num_stages=paged_prefill.NUM_STAGES),
    ),
    "attend_tile_overlaid": (
        paged_prefill._attend_tile,
        HEADS | dict(BLOCK_R=128, BLOCK_L=paged_prefill.BLOCK_ENTRIES),
        dict(num_warps=paged_prefill.NUM_WARPS, num_stages=paged_prefill.NUM_STAGES),
    ),
    "add_norm": (fused._add_norm, dict(D=960, BLOCK_D=1024, EARLY=True), EARLY),
    "rotate_and_store": (
        fused._rotate_and_store,
        dict(HEADS=15, GROUPS=5, HALF=32, BLOCK_J=32),
        dict(enable_fp_fusion=False),
    ),
    "swiglu": (fused._swiglu, dict(SIZE=2560, BLOCK_F=1024, EARLY=True), EARLY),
    "survey_blocks": (draw._survey_blocks, DRAW, EARLY),
    "survey_depths": (draw_limits.survey_depths, DRAW | dict(PAD_S=32, ROUND=1, T=draw_limits.DEPTHS), EARLY),
    "gather_near_cut": (
        draw_limits.gather_near_cut,
        DRAW | dict(PAD_S=32, ROUNDS=2, T=draw_limits.DEPTHS, C=draw_limits.ROOM),
        EARLY,
    ),
    "find_cut": (
        draw_limits.find_cut,
        DRAW | dict(PAD_S=32, SHIFT=16, C=draw_limits.ROOM),
        EARLY | dict(num_warps=draw._CUT_WARPS),
    ),
    "weigh_blocks": (draw._weigh_blocks, DRAW | dict(PAD_S=32), EARLY),
    "choose_tokens": (draw._choose_tokens, DRAW | dict(PAD_S=32), EARLY),
    "turn": (slot_kernels.turn_kernel, COLUMNS | PLACES | dict(ALL=False, BLOCK_F=8, BLOCK_N=512, RECURSIONS=3), {}),
    "advance": (
        slot_kernels.advance_kernel,
        PLACES | dict(NUM_INTS=21, RECURSIONS=3, HIDDEN=960, BLOCK_D=1024),
        {},
    ),
    "enter": (
        slot_kernels.enter_kernel,
        COLUMNS | PLACES | NO_OVERLAY | ENTER | dict(READS_FIRST=False, WRITES_OWN=True, TAKEN=1),
        {},
    ),
    "enter_nobody": (
        slot_kernels.enter_kernel,
        COLUMNS
        | PLACES
        | NO_OVERLAY
        | ENTER
        | dict(READS_FIRST=True, WRITES_OWN=False, TAKEN=3)
        | dict.fromkeys(("place_N", "ints_CI", "x_CD", "taken_C", "gate_C", "target_C")),
        {},
    ),
    "enter_overlaid": (
        slot_kernels.enter_kernel,
        COLUMNS | PLACES | ENTER | dict(READS_FIRST=True, WRITES_OWN=True, TAKEN=1, OVERLAYING=2),
        {},
    ),
    "settle": (slot_kernels.settle_kernel, dict(TAKEN=1, NUM_FLOATS=7, HIDDEN=960, BLOCK_D=1024), {}),
    "linear_normed_gated": (few_rows._linear_small, LINEAR | dict(PARTS=2, ADDS=False, K=960, SIZE=2560), EARLY),
    "linear_adding": (
        few_rows._linear_small,
        LINEAR | dict(PARTS=1, ADDS=True, K=2560, SIZE=960, norm_K=None),
        EARLY,
    ),
    "some_normed_gated": (
        some_rows._linear_some,
        SOME | dict(PARTS=2, ADDS=False, K=960, SIZE=2560, PAD_L=16, NUM_STAGES=3),
        EARLY | dict(num_warps=8),
    ),
}
INTEGERS = """
    table_TX row_N last_N tile_W3 last_M page_N place_N top_k_N top_k_NF seed_N index_N mass_NS sums_2NS token_N
    ints_IS ints_CI slot_C token_C target_C visit_1 lengths_SQ page_C entry_C table_C last_C page_AN entry_AN table_AN
    last_AN recursion_N recursion_M recursion_AN
""".split()
SHORT_INTEGERS = "found_N kept_N above_NS counts_2NS count_RNST tables_SQX reports_K3S overlay_RXP".split()
SINGLES = "part_NSHE lse_NSH logprob_N peak_NS total_NS mass_RNST near_NC gate_C logprob_C".split()
DOUBLES = "temperature_N temperature_NF top_p_NF min_p_N least_N floats_SF floats_CF gate_N".split()
BITS = "taken_C taken_N".split()


def type_of(name: str) -> str:
    """An argument's type, from its name: tensors end in their dimensions."""
    if not re.search(r"_[A-Z0-9]+$", name):
        return "fp32" if name in ("scale", "eps") else "i32"
    kinds = {"*i64": INTEGERS, "*i32": SHORT_INTEGERS, "*fp32": SINGLES, "*fp64": DOUBLES, "*i1": BITS}
    return next((kind for kind, names in kinds.items() if name in names), "*bf16")


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> dict[str, int]:
    """Bytes of stack, which spilled registers would take, and how often 16 bytes are read at once."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    aligned = [name for name in names if type_of(name).startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else type_of(name) for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    wide = re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", result.asm["ptx"])
    return {"stack": int(found[1]), "wide": len(wide)}


if __name__ == "__main__":
    json.dump({name: compiled(*case) for name, case in CASES.items()}, sys.stdout)
