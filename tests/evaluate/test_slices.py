"""Parts of a text and their standard errors, against values by hand and against a bootstrap over documents."""

from __future__ import annotations

import math

import pytest
import torch

from mor.evaluate.slices import LN2, PredictedTokens, by_depth, by_domain, by_position, describe, gap, ratio


def tokens(nll, documents, *, depths=None, sizes=None) -> PredictedTokens:
    count = len(nll)
    return PredictedTokens(
        nll_M=torch.tensor(nll),
        depth_M=torch.tensor(depths or [1] * count),
        bytes_M=torch.tensor(sizes or [1] * count),
        document_M=torch.tensor(documents),
        place_M=torch.arange(1, count + 1),
    )


def test_a_slice_by_hand() -> None:
    # Documents of 2 tokens with means 1 and 3: residuals -2 and +2, spread 8, times 2 / 1, root 4, over 4 tokens.
    part = describe("all", tokens([0.5, 1.5, 2.0, 4.0], [0, 0, 7, 7], depths=[1, 2, 3, 2], sizes=[1, 3, 2, 2]))
    assert (part.num_tokens, part.num_bytes, part.num_documents) == (4, 8, 2)
    assert part.nll == 2.0
    assert part.nll_error == pytest.approx(1.0)
    assert part.bits_per_byte == pytest.approx(8 / LN2 / 8)
    # Bits 2/ln2 and 6/ln2 over 4 bytes each; residuals -2/ln2 and 2/ln2 again, over 8 bytes.
    assert part.bits_per_byte_error == pytest.approx(4 / LN2 / 8)
    assert part.mean_depth == 2.0
    low, high = part.perplexity_interval
    assert math.log(high) - math.log(low) == pytest.approx(2 * 1.959964)
    assert low < math.exp(2) < high


def test_one_document_has_no_error_and_no_bytes_no_bits() -> None:
    part = describe("all", tokens([1.0, 2.0], [3, 3], sizes=[0, 0]))
    assert math.isnan(part.nll_error)
    assert math.isnan(part.bits_per_byte)
    with pytest.raises(ValueError, match="'none' has no predicted tokens"):
        describe("none", tokens([1.0], [0]).where(torch.tensor([False])))


def test_the_standard_error_is_that_of_a_bootstrap_over_documents() -> None:
    """Documents of different lengths with levels of their own; errors over tokens would be several times smaller."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(5, 80, (60,), generator=generator)
    document_M = torch.arange(60).repeat_interleave(sizes)
    level_D = torch.randn(60, generator=generator)
    nll_M = 3 + level_D[document_M] + 0.3 * torch.randn(len(document_M), generator=generator)
    value, error = ratio(nll_M, torch.ones_like(nll_M), document_M)
    sums = torch.bincount(document_M, weights=nll_M.double())
    drawn = torch.randint(60, (4000, 60), generator=generator)
    resampled = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert value == pytest.approx(float(nll_M.mean()), rel=1e-5)
    assert error == pytest.approx(float(resampled.std()), rel=0.1)
    assert error > 3 * float(nll_M.std()) / math.sqrt(len(nll_M))


def test_parts_add_up_and_are_named() -> None:
    found = tokens([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0, 0, 1, 1, 2, 2], depths=[1, 1, 3, 3, 3, 1])
    domains = by_domain(found, torch.tensor([1, 0, 1]), ("code", "prose"))
    assert [(part.name, part.num_tokens, part.nll) for part in domains] == [("prose", 4, 3.5), ("code", 2, 3.5)]
    assert [(part.name, part.nll) for part in by_position(found)] == [("1", 1.0), ("2-3", 2.5), ("4-6", 5.0)]
    assert [(part.name, part.nll) for part in by_depth(found)] == [("depth 1", 3.0), ("depth 3", 4.0)]


def test_the_gap_is_paired() -> None:
    """A difference that is the same everywhere has no error, however much the tokens differ."""
    causal = tokens([1.0, 5.0, 2.0, 9.0], [0, 0, 1, 1], depths=[2, 2, 2, 2])
    ahead = tokens([0.9, 4.9, 1.9, 8.9], [0, 0, 1, 1], depths=[1, 2, 1, 2])
    found = gap(causal, ahead)
    assert found.nll == pytest.approx(0.1, abs=1e-6)
    assert found.nll_error == pytest.approx(0.0, abs=1e-6)
    assert found.relative == pytest.approx(0.1 / 4.25, abs=1e-6)
    assert (found.causal_depth, found.top_k_depth) == (2.0, 1.5)
