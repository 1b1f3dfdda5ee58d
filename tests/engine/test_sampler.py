"""Tokens follow the distribution that was asked for, and a request's tokens depend on nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from mor.engine import sampler
from mor.engine.params import SamplingParams
from mor.engine.sampler import SamplingRow, edit, sample, uniform, weigh

LOGITS = st.lists(st.integers(-40, 40).map(lambda eighths: eighths / 8), min_size=1, max_size=12)
WIDE_LOGITS = st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=1, max_size=12)
GREEDY: dict[str, Any] = dict(temperature=0.0)


def row(
    *,
    seed: int = 0,
    index: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: tuple[int, ...] = (),
    **params: Any,
) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**params), seed=seed, index=index, prompt=prompt, output=output, banned=banned
    )


def tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return [sampled.token for sampled in sample(logits, rows)]


def probabilities(logits: list[float], **params: Any) -> list[float]:
    """What a row with these logits draws from."""
    [weights] = weigh(torch.tensor([logits]).double(), [row(**params)]).tolist()
    return [weight / sum(weights) for weight in weights]


class OnTheEdgeError(Exception):
    """Rounding decides."""


def reference(
    logits: list[float], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Temperature, top-k, top-p and min-p, one token after the other."""
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: top_k or len(order)]
    total, mass = sum(weights[token] for token in kept), 0.0
    for count, token in enumerate(kept):
        mass += weights[token]
        if top_p < 1 and abs(mass / total - top_p) < 1e-6:
            raise OnTheEdgeError
        if mass / total >= top_p:
            kept = kept[: count + 1]
            break
    kept = [token for token in kept if weights[token] >= min_p]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def chi_square(counts: list[int], expected: list[float]) -> float:
    """The statistic as a standard normal deviate (Wilson and Hilferty 1931)."""
    draws = sum(counts)
    assert all(count == 0 for count, share in zip(counts, expected) if share == 0)
    parts = [(count - draws * share) ** 2 / (draws * share) for count, share in zip(counts, expected) if share]
    freedom = len(parts) - 1
    spread = 2 / (9 * freedom)
    return ((sum(parts) / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


# the draw


@pytest.mark.parametrize("along", ["seed", "index"])
@pytest.mark.parametrize("params", [{}, dict(temperature=2.0), dict(top_k=3), dict(top_p=0.8), dict(min_p=0.2)])
def test_draws_follow_the_distribution(along: str, params: dict[str, Any]) -> None:
    logits, draws = [0.5, -1.0, 1.5, -math.inf, 0.0, 1.4, -2.0], 20_000
    counts = [0] * len(logits)
    rows = [row(**{along: number}, **params) for number in range(draws)]
    for token in tokens(torch.tensor([logits]).expand(draws, -1), rows):
        counts[token] += 1
    assert abs(chi_square(counts, reference(logits, **params))) < 3.5


def test_uniform_numbers_are_even_and_unrelated() -> None:
    seeds, indices = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    u = uniform(seeds.flatten(), indices.flatten())
    counts = torch.bincount((u * 100).long(), minlength=100).tolist()
    assert u.min() >= 0 and u.max() < 1
    assert abs(chi_square(counts, [0.01] * 100)) < 3.5
    square = u.view(200, 200) - 0.5
    for neighbours in (square[1:] * square[:-1], square[:, 1:] * square[:, :-1], square[1:, :-1] * square[:-1, 1:]):
        assert abs(neighbours.mean() * 12) * math.sqrt(neighbours.numel()) < 4
    assert u.unique().numel() == u.numel()


def test_uniform_numbers_never_change() -> None:
    """A seed that somebody noted must give the same tokens in every later version: SplitMix64 in plain integers."""

    def mix(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ (value >> shift)) * factor % 2**64
        return value ^ (value >> 31)

    step = 0x9E3779B97F4A7C15
    for seed, index in ((0, 0), (1, 0), (0, 1), (123456789, 77), (2**63 - 1, 5)):
        hashed = mix((mix((seed + 1) * step % 2**64) + (index + 1) * step) % 2**64)
        assert uniform(torch.tensor([seed]), torch.tensor([index])).item() == (hashed >> 11) / 2**53
    assert uniform(torch.tensor([0]), torch.tensor([0])).item() == 0.6524484863740322


def test_a_number_picks_the_token_whose_share_holds_it() -> None:
    weights = torch.tensor([[0, 0, 5, 0, 3, 0]])
    numbers = {0.0: 2, 0.624: 2, 0.625: 4, 1 - 2**-53: 4}
    for number, token in numbers.items():
        assert sampler.draw(weights, torch.tensor([number], dtype=torch.double)).tolist() == [token]


@pytest.mark.parametrize("total", [1, 3, 2**53 - 1, 2**53 + 1, 2**61, 2**61 + 513, 2**62 - 1, 2**62 - 256])
def test_the_largest_number_stays_below_the_total(total: int) -> None:
    largest = torch.tensor([1 - 2**-53], dtype=torch.double)
    assert sampler.draw(torch.tensor([[0, total, 0]]), largest).tolist() == [1]


def test_seeds_of_any_size_are_taken() -> None:
    logits = torch.zeros(4, 1000)
    found = tokens(logits, [row(seed=seed) for seed in (5, 5 + 2**64, 2**63, 2**100 + 5)])
    assert found[0] == found[1] == found[3] != found[2]


def test_a_seed_gives_the_same_tokens_and_another_others() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    first, again, other = (tokens(logits, [row(seed=seed, index=n) for n in range(64)]) for seed in (7, 7, 8))
    assert first == again
    assert sum(a == b for a, b in zip(first, other)) < 16


# filters


@given(
    logits=LOGITS | WIDE_LOGITS,
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    few=st.sampled_from([1, 3, sampler.FEW]),
)
def test_filters_equal_the_reference(logits: list[float], few: int, **params: Any) -> None:
    assume(max(logits) > -math.inf)
    try:
        expected = reference(logits, **params)
    except OnTheEdgeError:
        reject()
    largest = max(expected)
    assume(all(not share or share / largest > 1e-9 for share in expected))  # finer than a weight's unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "FEW", few)
        assert probabilities(logits, **params) == pytest.approx(expected, rel=1e-3, abs=1e-11)


@given(logits=LOGITS, top_k=st.integers(1, 12))
def test_top_k_keeps_k_tokens_and_the_lower_ids_of_equals(logits: list[float], top_k: int) -> None:
    kept = {token for token, share in enumerate(probabilities(logits, top_k=top_k)) if share}
    assert kept == set(sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k])


def test_top_p_at_the_edge_and_with_ties() -> None:
    assert probabilities([0.0] * 4, top_p=0.5) == [0.5, 0.5, 0, 0]
    assert probabilities([0.0] * 4, top_p=0.51) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert probabilities([0.0] * 10, top_p=0.9) == pytest.approx([1 / 9] * 9 + [0])
    assert probabilities([0.0, 1.0], top_p=1e-9) == [0, 1]
    assert probabilities([3.0, 3.0, 3.0], top_k=2, top_p=0.5) == [1, 0, 0]
    beside = weigh(torch.full((2, 4), 3.0).double(), [row(top_k=2, top_p=0.5), row(top_k=3)])
    assert (beside > 0).sum(-1).tolist() == [1, 3]


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 5000])
def test_top_p_of_a_large_vocabulary(spread: float, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a few of the largest or from all of them: the same tokens, with flat and steep rows side by side."""
    logits = torch.randn(6, 4000, generator=torch.Generator().manual_seed(3)).double() * spread
    logits[1::2] *= 4
    rows = [row(top_p=0.3 + 0.13 * n, top_k=top_k) for n in range(6)]
    by_few = weigh(logits, rows)
    monkeypatch.setattr(sampler, "FEW", 4000)
    assert by_few.equal(weigh(logits, rows))
    for n in range(6):
        share = logits[n].softmax(-1).sort(descending=True).values.cumsum(-1)
        assert abs(int((by_few[n] > 0).sum()) - int((share < 0.3 + 0.13 * n).sum()) - 1) <= 1


def test_min_p_is_relative_to_the_largest() -> None:
    logits = [math.log(share) for share in (0.5, 0.25, 0.15, 0.1)]
    assert probabilities(logits, min_p=0.29) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    assert probabilities([1.0, 1.0, 0.9], min_p=1.0) == [0.5, 0.5, 0]


def test_nothing_is_sorted_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sorted")

    with monkeypatch.context() as patch:
        for name in ("sort", "topk", "argsort"):
            patch.setattr(torch.Tensor, name, fail)
        sample(torch.zeros(3, 5), [row(), row(**GREEDY, logprobs=0), row(temperature=0.5, min_p=0.1, top_k=5)])
        with pytest.raises(AssertionError, match="sorted"):
            sample(torch.zeros(1, 5), [row(top_p=0.5)])


def test_only_rows_that_need_it_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows: list[int] = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **how: sorted_rows.append(len(x)) or sort(x, **how))
    logits = torch.zeros(4, 2000)
    logits[1, 7] = 50.0
    sample(logits, [row(top_p=0.9), row(top_p=0.9), row(top_p=0.9, top_k=9), row()])
    assert sorted_rows == [1]


def test_plain_greedy_rows_are_not_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(sampler, "edit", lambda logits, chosen: rows.append(len(chosen)) or edit(logits, chosen))
    sample(torch.zeros(3, 5), [row(**GREEDY)] * 3)
    sample(torch.zeros(3, 5), [row(**GREEDY), row(), row(**GREEDY, banned=(0,))])
    assert rows == [2]


# penalties and bans


def test_penalties_by_hand() -> None:
    settings: dict[str, Any] = dict(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    [edited] = edit(
        torch.tensor([[4.0, -1.0, 3.0, -2.0, 1.0, 0.0]]), [row(**settings, prompt=[0, 1, 0], output=[2, 2, 3])]
    ).tolist()
    assert edited == [2.0, -2.0, 1.5 - 0.5 - 0.5, -4.0 - 0.5 - 0.25, 1.0, 0.0]


def test_each_row_has_its_own_penalties() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 5)
    rows = [
        row(output=[2]),
        row(repetition_penalty=0.5, prompt=[0]),
        row(presence_penalty=-1.0, output=[1, 1]),
        row(frequency_penalty=-1.0, output=[1, 1], prompt=[0]),
        row(banned=(2, 0), presence_penalty=2.0),
    ]
    expected = [[1, 2, 3], [2, 2, 3], [1, 3, 3], [1, 4, 3], [-math.inf, 2, -math.inf]]
    assert edit(logits, rows).tolist() == expected
    assert logits.tolist() == [[1.0, 2.0, 3.0]] * 5


def test_greedy_takes_the_largest_after_penalties_and_bans() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    rows = [row(**GREEDY), row(**GREEDY, repetition_penalty=4.0, prompt=[2]), row(**GREEDY, banned=(2, 1, 3, -1))]
    assert tokens(logits, rows) == [2, 1, 0]


def test_of_equals_greedy_takes_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0], [-0.0, 0.0, -0.0, 0.0]])
    assert tokens(logits, [row(**GREEDY)] * 2) == [1, 0]
    assert tokens(logits, [row(**GREEDY, banned=(1,)), row(**GREEDY, banned=(0,))]) == [2, 1]


# log-probabilities


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]] * 4)
    log = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1).tolist()
    changed: dict[str, Any] = dict(temperature=0.01, repetition_penalty=1.5, top_k=1)
    found = sample(
        logits,
        [
            row(**changed, prompt=[1], logprobs=0),
            row(**GREEDY, banned=(2,), logprobs=2),
            row(**GREEDY, logprobs=100),
            row(**GREEDY),
        ],
    )
    assert [sampled.logprob for sampled in found] == [pytest.approx(log[2]), pytest.approx(log[1]), log[2], None]
    assert [[token for token, _ in sampled.top] for sampled in found] == [[], [2, 1], [2, 1, 0], []]
    assert [logprob for _, logprob in found[2].top] == pytest.approx([log[2], log[1], log[0]])


@given(logits=st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 2.0]), min_size=1, max_size=40), k=st.integers(1, 8))
def test_most_probable_tokens_with_ties(logits: list[float], k: int) -> None:
    [alone] = sample(torch.tensor([logits]), [row(**GREEDY, logprobs=k)])
    assert [token for token, _ in alone.top] == sorted(range(len(logits)), key=lambda token: (-logits[token], token))[
        :k
    ]
