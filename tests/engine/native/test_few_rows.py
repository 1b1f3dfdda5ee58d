"""The C program against its twins in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.engine import plain_ops
from mor.engine.kv_store import Overlay
from mor.engine.layers import Layers, Pages, Rows
from mor.engine.native.few_rows import FewRows, Seen, few_rows_for
from mor.engine.native.library import open_library
from mor.model.modeling_mor import MorForCausalLM
from tests.tiny import tiny_model

CPU, PAGES, ENTRIES = torch.device("cpu"), 60, 3
SHAPES: list[dict[str, Any]] = [
    {},
    dict(attention_bias=True, mlp_bias=True),
    dict(hidden_size=50, intermediate_size=37, head_dim=6, num_attention_heads=5, num_key_value_heads=1),
    dict(hidden_size=96, intermediate_size=130, head_dim=24, num_attention_heads=8, num_key_value_heads=8),
]


def native(model: MorForCausalLM) -> FewRows:
    try:
        return FewRows(model.config, open_library())
    except OSError as error:
        pytest.skip(str(error))


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """Rows of random lengths; the last row but one takes no part."""

    rotary: tuple[Tensor, Tensor]
    page_N: Tensor | None
    place_N: Tensor
    seen: Seen

    def attend(self, query_NHE: Tensor, pages: Pages) -> Tensor:
        seen = self.seen
        index = seen.table_TX, seen.row_N, seen.last_N, seen.longest
        return plain_ops.attend_pages(query_NHE, *pages, *index, seen.overlay)


def random_rows(model: MorForCausalLM, num_rows: int, *, writes: bool, overlaid: bool = False) -> TableRows:
    """Overlaid, rows of two recursions: half of the entries of each row lie over others that it reads."""
    tables = 2 if overlaid else 1
    width = (PAGES - 1) // (num_rows * tables)
    last_N = torch.randint(ENTRIES * width, (num_rows,))
    number_N, row_N = last_N.clone(), torch.arange(num_rows) * tables
    table_NX = 1 + torch.randperm(num_rows * tables * width).view(num_rows * tables, width).int()
    page_N, overlay = table_NX[row_N, last_N // ENTRIES].long(), None
    if overlaid:
        entry_1XP = torch.randint(ENTRIES * width, (1, PAGES, ENTRIES), dtype=torch.int32)
        entry_1XP[torch.rand(entry_1XP.shape) < 0.5] = -1
        entry_1XP[0, page_N, last_N % ENTRIES] = last_N.int()
        overlay = Overlay(torch.arange(num_rows) % 2, entry_1XP)
        page_N = table_NX[row_N + overlay.recursion_N, last_N // ENTRIES].long()
    if num_rows > 2:
        last_N[-2], page_N[-2] = -1, 0
    cos_1NE, sin_1NE = model.model.rotary_emb(torch.empty(1), position_ids=number_N[None])
    return TableRows(
        rotary=(cos_1NE[0], sin_1NE[0]),
        page_N=page_N if writes else None,
        place_N=number_N % ENTRIES,
        seen=Seen(
            table_TX=table_NX,
            row_N=row_N,
            last_N=last_N,
            longest=int(last_N.max().clamp(min=0)) + 1,
            overlay=overlay,
        ),
    )


@pytest.mark.parametrize(("writes", "overlaid"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("num_rows", [1, 3, 7, 14, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "biases", "odd", "large heads"])
@torch.no_grad()
def test_layers_are_those_of_pytorch(shape: dict[str, Any], num_rows: int, writes: bool, overlaid: bool) -> None:
    """Outputs and pages, on one thread and on two."""
    torch.manual_seed(num_rows)
    model = tiny_model(**shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    block, config = list(model.model.recursion.block), model.config
    rows = random_rows(model, num_rows, writes=writes, overlaid=overlaid)
    pool = torch.randn(PAGES, len(block), 2, ENTRIES, config.num_key_value_heads, config.head_dim)
    x_ND, each = torch.randn(num_rows, config.hidden_size), [rows] * len(block)
    results = []
    for few_rows in (None, native(model)):
        own = pool.clone()
        pages = [(own[:, layer, 0], own[:, layer, 1]) for layer in range(len(block))]
        typed: list[Rows] = list(each)
        results.append((Layers(config, plain_ops, few_rows)(block, x_ND.clone(), typed, pages), own[1:]))
    takes_N = rows.seen.last_N >= 0
    torch.testing.assert_close(results[1][0][takes_N], results[0][0][takes_N], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1][0][~takes_N], x_ND[~takes_N])


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 16, 4), (5, 33, 7), (10, 96, 22), (11, 16, 9), (20, 192, 130)])
def test_logits_are_pytorchs(size: tuple[int, int, int]) -> None:
    rows, hidden, vocabulary = size
    x_ND, norm_D, weight_VD = torch.randn(rows, hidden), torch.rand(hidden), torch.randn(vocabulary, hidden)
    program, eps = native(tiny_model()), tiny_model().config.rms_norm_eps
    expected = torch.nn.functional.rms_norm(x_ND, (hidden,), norm_D, eps) @ weight_VD.T
    torch.testing.assert_close(program.logits(x_ND, norm_D, weight_VD), expected, rtol=1e-5, atol=1e-4)


def test_tokens_are_the_samplers() -> None:
    """Of any temperature and spread; NaN and infinity in rows beside them."""
    generator, program = torch.Generator().manual_seed(0), native(tiny_model())
    for trial in range(20):
        logits_NV = torch.randn(9, 3000, generator=generator) * (1 + trial)
        temperature_N = torch.rand(9, generator=generator).double() * 2
        temperature_N[::4], temperature_N[6] = 0, 1
        logits_NV[1, :3] = torch.tensor([float("nan"), 3.0, -float("inf")])
        logits_NV[2, 5] = float("inf")
        logits_NV[3] = -float("inf")
        logits_NV[4, 7:9] = 100.0
        logits_NV[5, ::2] = -float("inf")
        seed_N = torch.randint(-(2**62), 2**62, (9,), generator=generator)
        none_N, index_N = torch.zeros(9, dtype=torch.int64), torch.arange(9)
        filters = none_N, torch.ones(9), torch.zeros(9)
        expected = plain_ops.draw_tokens(logits_NV, temperature_N, *filters, seed_N, index_N)
        drawn = program.draw(logits_NV, temperature_N, seed_N, index_N)
        assert torch.equal(drawn[0], expected[0])
        torch.testing.assert_close(drawn[1], expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert drawn[0][:5].tolist()[1:4] == [-1, -1, -1] and int(drawn[0][4]) == 7


def test_threads_share_the_work() -> None:
    model, before = tiny_model(hidden_size=64), torch.get_num_threads()
    program, weights = native(model), (torch.randn(6, 64), torch.rand(64), torch.randn(101, 64))
    try:
        torch.set_num_threads(1)
        alone = program.logits(*weights)
        torch.set_num_threads(3)
        assert torch.equal(program.logits(*weights), alone)
    finally:
        torch.set_num_threads(before)


def test_says_what_it_cannot_do() -> None:
    gelu = tiny_model(hidden_act="gelu").config
    assert few_rows_for(gelu, CPU, torch.float32, None) is None
    assert few_rows_for(tiny_model().config, CPU, torch.float32, False) is None
    with pytest.raises(ValueError, match=r"native=True: it is for float32 on a CPU with silu, not .*gelu"):
        few_rows_for(gelu, CPU, torch.float32, True)
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        few_rows_for(tiny_model().config, CPU, torch.bfloat16, True)


def test_goes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    config = tiny_model().config
    with pytest.warns(UserWarning, match="PyTorch alone, which is slower: there is no C compiler"):
        assert few_rows_for(config, CPU, torch.float32, None) is None
    with pytest.raises(ValueError, match="native=True: there is no C compiler"):
        few_rows_for(config, CPU, torch.float32, True)
