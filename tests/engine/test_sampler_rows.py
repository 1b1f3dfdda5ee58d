"""The sampler's rows do not disturb each other; and its edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.engine import sampler
from mor.engine.sampler import Sampled, SamplingRow, sample, weigh
from tests.engine.test_sampler import GREEDY, WIDE_LOGITS, probabilities, row, tokens

# rows do not disturb each other

ROWS = st.builds(
    row,
    seed=st.integers(0, 2**64),
    index=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, 36), max_size=4),
    output=st.lists(st.integers(0, 36), max_size=4),
    banned=st.lists(st.integers(0, 36), max_size=2).map(tuple),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, 50]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.3]),
    logprobs=st.sampled_from([None, 0, 2, 5]),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_a_row_alone_equals_the_row_in_a_batch(rows: list[SamplingRow], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 37, generator=generator) * 2
    logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.3, logits.round(), logits)
    together = sample(logits, rows)
    assert [sample(logits[n : n + 1], rows[n : n + 1])[0] for n in range(len(rows))] == together
    assert sample(logits.flip(0), rows[::-1]) == together[::-1]
    drawing = [n for n, row in enumerate(rows) if not row.params.is_greedy]
    if drawing:
        weights = weigh(logits[drawing].double(), [rows[n] for n in drawing])
        alone = [weigh(logits[n : n + 1].double(), rows[n : n + 1]) for n in drawing]
        assert weights.equal(torch.cat(alone))


def test_a_large_vocabulary_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(7, 49_153, generator=torch.Generator().manual_seed(1)) * 3
    rows = [row(seed=n, temperature=0.9 + n / 7, top_p=1 - n / 20, logprobs=n) for n in range(7)]
    together = sample(logits, rows)
    assert together == [sample(logits[n : n + 1], rows[n : n + 1])[0] for n in range(7)]
    assert len({sampled.token for sampled in together}) > 3


@pytest.mark.parametrize(
    ("bad", "changes", "message"),
    [
        ([0.0, math.nan, 1.0], {}, "NaN"),
        ([0.0, math.nan, 1.0], GREEDY, "NaN"),
        ([0.0, math.nan, 1.0], dict(banned=(1,), logprobs=2), "NaN"),
        ([0.0, math.inf, 1.0], dict(top_p=0.5), "infinity"),
        ([0.0, math.inf, 1.0], dict(banned=(1,)), "infinity"),
        ([-math.inf] * 3, dict(top_k=1), "probability 0"),
        ([-math.inf] * 3, GREEDY, "probability 0"),
        ([0.0, 1.0, -math.inf], dict(banned=(0, 1), top_k=2, top_p=0.5), "probability 0 after penalties and bans"),
        ([0.0, 1.0, 2.0], dict(GREEDY, banned=(0, 1, 2)), "probability 0 after penalties and bans"),
        ([0.0, 1.0, 2.0], dict(repetition_penalty=5e-324, prompt=[1]), "infinity after penalties"),
    ],
)
def test_a_bad_row_fails_alone(
    bad: list[float], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weigh_finite(x: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        assert x.max(-1).values.isfinite().all()
        return weigh(x, rows)

    monkeypatch.setattr(sampler, "weigh", weigh_finite)
    good = [row(seed=1, top_p=0.9, logprobs=1), row(seed=2), row(**GREEDY, logprobs=0)]
    logits = torch.tensor([[0.5, 0.1, 0.9]] * 3)
    rows = [good[0], row(**changes), *good[1:]]
    with_bad = sample(torch.cat([logits[:1], torch.tensor([bad]), logits[1:]]), rows)
    failed = with_bad.pop(1)
    assert with_bad == sample(logits, good)
    assert failed == Sampled(token=-1, error=failed.error)
    assert failed.error is not None and message in failed.error


# edges


@pytest.mark.parametrize("params", [{}, GREEDY, dict(top_k=5), dict(top_p=0.1), dict(min_p=1.0), dict(temperature=9.0)])
def test_a_vocabulary_of_one(params: dict[str, Any]) -> None:
    [sampled] = sample(torch.tensor([[-7.0]]), [row(**params, logprobs=3)])
    assert sampled == Sampled(token=0, logprob=0.0, top=((0, 0.0),))


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("params", [{}, dict(top_k=3), dict(top_p=0.9), dict(min_p=0.5)])
def test_extreme_temperatures(params: dict[str, Any]) -> None:
    logits = torch.tensor([[1.0, 1e30, -1e30, 1.0000001e30, -math.inf]])
    assert tokens(logits, [row(temperature=5e-324, **params)]) == [3]
    assert tokens(logits, [row(temperature=1e-30, **params)]) == [3]
    near = probabilities([0.0, 1.0, 2.0, -math.inf], temperature=1e300)
    assert near == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert probabilities([0.0, 1.0, 2.0], temperature=1e100, top_k=1) == [0, 0, 1]


@given(logits=WIDE_LOGITS, seed=st.integers(0, 2**32))
def test_a_token_of_probability_0_is_never_drawn(logits: list[float], seed: int) -> None:
    [sampled] = sample(torch.tensor([logits]), [row(seed=seed, temperature=5.0)])
    assert (sampled.error is not None) == (max(logits) == -math.inf)
    assert sampled.error is not None or logits[sampled.token] > -math.inf


@pytest.mark.gpu
def test_cuda_draws_the_same_tokens() -> None:
    logits = torch.randn(64, 49_152, generator=torch.Generator().manual_seed(2)) * 3
    kinds = [{}, dict(top_k=50), dict(top_p=0.9), dict(min_p=0.05), GREEDY, dict(repetition_penalty=1.2, prompt=[1, 2])]
    rows = [row(seed=n, logprobs=n % 3, **kinds[n % len(kinds)]) for n in range(64)]
    on_cpu, on_cuda = sample(logits, rows), sample(logits.cuda(), rows)
    assert [sampled.token for sampled in on_cpu] == [sampled.token for sampled in on_cuda]
    for cpu, cuda in zip(on_cpu, on_cuda):
        assert [token for token, _ in cpu.top] == [token for token, _ in cuda.top]
        assert cuda.logprob == (None if cpu.logprob is None else pytest.approx(cpu.logprob, abs=1e-4))
