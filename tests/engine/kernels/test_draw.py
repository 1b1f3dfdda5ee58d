"""The sampling kernel against the sampler: the same tokens, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mor.engine import plain_ops, sampler
from mor.engine.params import SamplingParams
from mor.engine.sampler import SamplingRow, sample

pytest.importorskip("triton")

from mor.engine.kernels import draw as draw_module
from mor.engine.kernels.draw import draw_tokens

VOCABULARY = 150
GREEDY = SamplingParams(temperature=0)
FILTERS = {
    "none": {},
    "top_k": dict(top_k=5),
    "top_k 1": dict(top_k=1),
    "top_k all": dict(top_k=1000),
    "top_p": dict(top_p=0.7),
    "top_p tiny": dict(top_p=1e-6),
    "top_p nearly 1": dict(top_p=1 - 1e-12),
    "min_p": dict(min_p=0.05),
    "all": dict(top_k=20, top_p=0.8, min_p=0.02),
    "top_k within ties": dict(top_k=33, top_p=0.95),
}


def draw(
    logits_NV: Tensor, params: list[SamplingParams], seeds: list[int], indices: list[int], **options: int
) -> tuple[Tensor, Tensor]:
    """By the kernel, with the rows' numbers as columns of wider tables, as slots hold them."""
    device = logits_NV.device
    floats = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], dtype=torch.float64, device=device)
    ints = torch.tensor([[p.top_k, s, i] for p, s, i in zip(params, seeds, indices)], device=device)
    columns = floats[:, 0], ints[:, 0], floats[:, 1], floats[:, 2], ints[:, 1], ints[:, 2]
    token_N, logprob_N = draw_tokens(logits_NV, *columns, **(dict(block=256) | options))
    plain = [each.to(device) for each in plain_ops.draw_tokens(logits_NV, *columns)]
    assert torch.equal(plain[0], token_N)
    torch.testing.assert_close(plain[1], logprob_N, equal_nan=True, rtol=1e-6, atol=1e-5)
    if all(p.is_greedy or (p.top_p == 1 and not 0 < p.top_k < logits_NV.shape[1]) for p in params):
        unlimited = draw_tokens(logits_NV, *columns, limited=False, **(dict(block=256) | options))
        assert torch.equal(unlimited[0], token_N)
        torch.testing.assert_close(unlimited[1], logprob_N, equal_nan=True, rtol=0, atol=0)
    return token_N, logprob_N


def ties(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits in steps of a half, with zeros of both signs and tokens of probability 0."""
    logits_NV = (torch.randn(rows, VOCABULARY) * 6).round() / 2
    logits_NV[:, ::7] = -0.0
    logits_NV[:, 3::50] = -math.inf
    return logits_NV.to(device, dtype)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 0.7), (torch.bfloat16, 5.0)])
def test_draws_what_the_sampler_draws(
    filters: dict[str, float], dtype: torch.dtype, temperature: float, device: torch.device
) -> None:
    logits_NV = torch.cat((ties(1, dtype, device), torch.randn(1, VOCABULARY, device=device).to(dtype)))
    params = SamplingParams(temperature=temperature, logprobs=0, **filters)  # type: ignore[arg-type]
    seeds, indices = [3, -(2**62)], [0, 100_000]
    rows = [SamplingRow(params=params, seed=s, index=i) for s, i in zip(seeds, indices)]
    expected = sample(logits_NV.float(), rows)
    token_N, logprob_N = draw(logits_NV, [params] * 2, seeds, indices)
    assert token_N.tolist() == [each.token for each in expected]
    assert logprob_N.tolist() == pytest.approx([each.logprob for each in expected], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("filters", [{}, dict(min_p=0.1), dict(top_k=40, top_p=0.97)], ids=["none", "min_p", "nucleus"])
def test_many_tokens_are_drawn(filters: dict[str, float], block: int, device: torch.device) -> None:
    """Over many seeds, in blocks that the vocabulary does and does not fill, the same tokens as the sampler's."""
    logits_NV = ties(1, torch.bfloat16, device).repeat(7, 1)
    params = SamplingParams(temperature=2.0, logprobs=0, **filters)  # type: ignore[arg-type]
    token_N, _ = draw(logits_NV, [params] * 7, list(range(7)), [5] * 7, block=block)
    assert len(set(token_N.tolist())) > 3


@pytest.mark.parametrize("room", [16, 1024])
@pytest.mark.parametrize("filters", [dict(top_p=0.8), dict(top_k=40), dict(top_k=60, top_p=0.7)], ids=str)
def test_a_cut_is_found_among_many_tokens(filters: dict[str, float], room: int, device: torch.device) -> None:
    """Of which some are equal, and whether or not there is room for those near it."""
    logits_NV = (torch.randn(3, 1200, device=device) * torch.tensor([[3.0], [1.0], [0.01]], device=device)).bfloat16()
    params = SamplingParams(temperature=0.8, logprobs=0, **filters)  # type: ignore[arg-type]
    draw(logits_NV, [params] * 3, [1, 2, 3], [0] * 3, block=512, room=room)


def test_min_p_keeps_what_weighs_just_enough(device: torch.device) -> None:
    """Its share of the largest weight, 2**40, lies between two integers: the lower one is dropped."""
    x = math.log(0.25)
    logits_NV = torch.tensor([[0.0, x, -math.inf]], dtype=torch.float32, device=device).repeat(20, 1)
    weight = round(math.exp(float(logits_NV[0, 1])) * 2**40)
    for min_p, kept in ((weight / 2**40, {0, 1}), ((weight + 0.25) / 2**40, {0})):
        token_N, _ = draw(logits_NV, [SamplingParams(min_p=min_p)] * 20, list(range(20)), [0] * 20)
        assert set(token_N.tolist()) == kept


def test_rows_of_all_kinds_side_by_side(device: torch.device) -> None:
    """Each as alone."""
    logits_NV = ties(5, torch.float32, device)
    logits_NV[3, 40] = math.nan
    kinds = [GREEDY, SamplingParams(), SamplingParams(top_k=9), SamplingParams(), SamplingParams(top_p=0.8, min_p=0.1)]
    together = draw(logits_NV, kinds, [7] * 5, [1] * 5, block=32)
    for n, params in enumerate(kinds):
        alone = draw(logits_NV[n : n + 1], [params], [7], [1], block=32)
        assert torch.equal(alone[0][0], together[0][n])
        assert torch.equal(alone[1], together[1][n : n + 1]) or n == 3


def test_temperature_0_takes_the_lower_id_of_equals(device: torch.device) -> None:
    logits_NV = torch.full((2, VOCABULARY), -1.0, device=device)
    logits_NV[0, [134, 70, 90]] = 2.0
    logits_NV[1, 0], logits_NV[1, 3] = -0.0, 0.0
    assert draw(logits_NV, [GREEDY] * 2, [0, 0], [0, 0], block=64)[0].tolist() == [70, 0]


def test_logits_that_are_equal_once_scaled_are_ties(device: torch.device) -> None:
    """Beside 10, 1e-30 and 2e-30 are the same: of them the lower ids stay, not the larger logits."""
    logits_NV = torch.arange(1.0, 41.0, device=device).mul(1e-30).repeat(6, 1)
    logits_NV[:, 20] = 10.0
    params = [SamplingParams(temperature=10.0, top_k=4), SamplingParams(temperature=10.0, top_p=0.2)] * 3
    token_N, _ = draw(logits_NV, params, [0, 1, 2, 3, 4, 5], [0] * 6)
    assert set(token_N[::2].tolist()) <= {0, 1, 2, 20}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a compiled kernel keeps its own uniform numbers")
@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.5, 3)])
def test_the_running_sum_must_exceed_the_target(
    number: float, token: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of probability 0 are not drawn, be the target 0 or just the sum before them."""
    tl = pytest.importorskip("triton.language")
    monkeypatch.setattr(draw_module, "_uniform", lambda seed, index: tl.full([], number, tl.float64))
    monkeypatch.setattr(sampler, "uniform", lambda seed, index: torch.full(seed.shape, number, dtype=torch.float64))
    logits_NV = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]], device=device)
    assert draw(logits_NV, [SamplingParams()], [0], [0])[0].tolist() == [token]


def test_rows_without_a_token_disturb_no_other(device: torch.device) -> None:
    logits_NV = torch.randn(6, VOCABULARY, device=device)
    logits_NV[0, 149], logits_NV[1, 2] = math.nan, math.inf
    logits_NV[2], logits_NV[4] = -math.inf, math.nan
    params = [SamplingParams(), GREEDY, SamplingParams(top_k=3), SamplingParams(top_p=0.5), GREEDY, GREEDY]
    token_N, logprob_N = draw(logits_NV, params, [1] * 6, [2] * 6)
    assert token_N[[0, 1, 2, 4]].tolist() == [-1] * 4 and bool(logprob_N[[0, 1, 2, 4]].isnan().all())
    assert token_N[5] == logits_NV[5].argmax()


def test_seeds_and_indices_decide(device: torch.device) -> None:
    logits_NV = torch.zeros(8, VOCABULARY, device=device)
    seeds, indices = [1, 2, 1, 1, 3, 4, 5, 6], [0, 0, 1, 0, 0, 0, 0, 0]
    tokens = draw(logits_NV, [SamplingParams()] * 8, seeds, indices)[0].tolist()
    assert tokens[0] == tokens[3] and len(set(tokens)) > 4


def test_no_rows_and_slices_of_wider_rows(device: torch.device) -> None:
    wide_NV = torch.randn(2, VOCABULARY + 10, device=device)
    assert torch.equal(
        draw(wide_NV[:, :VOCABULARY], [GREEDY] * 2, [0, 0], [0, 0])[0], wide_NV[:, :VOCABULARY].argmax(1)
    )
    nothing = torch.empty(0, device=device)
    assert draw_tokens(wide_NV[:0], *[nothing] * 6)[0].shape == (0,)


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    logits_NV, column = torch.zeros(2, 8, device=device), torch.zeros(2, device=device)
    with pytest.raises(ValueError, match="are not rows of single floats"):
        draw_tokens(logits_NV.double(), *[column] * 6)
    with pytest.raises(ValueError, match="must have 2 rows"):
        draw_tokens(logits_NV, *[column] * 5, column[:1])
    with pytest.raises(ValueError, match="block=24 must be a power of two"):
        draw_tokens(logits_NV, *[column] * 6, block=24)
