"""NLL, bits per byte and standard errors, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.evaluate.perplexity import QualityTally, clustered_error, measure_quality, token_byte_lengths
from mor.model.cost import complete_flops, kv_bytes
from mor.model.scoring import TokenScores
from tests.evaluate.models import VOCABULARY, calibrated, model, rows

ONE_BYTE = torch.ones(VOCABULARY, dtype=torch.int64)


def test_values_by_hand() -> None:
    tally = QualityTally(num_recursions=2)
    config = model(num_recursions=2).config
    scores = TokenScores(
        nll_BT=torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 0.0]]),
        depths_BT=torch.tensor([[1, 2, 1], [2, 2, 1]]),
        counted_BT=torch.tensor([[False, True, True], [False, True, False]]),
    )
    tally.add(scores, torch.tensor([[9, 1, 2], [9, 3, 9]]))
    quality = tally.quality("causal", None, config)
    assert quality.num_tokens == 3
    assert quality.num_bytes == 6
    assert quality.nll == 2.0
    assert quality.perplexity == pytest.approx(math.e**2)
    assert quality.bits_per_byte == pytest.approx(6 / math.log(2) / 6)
    assert quality.mean_depth == 9 / 6
    assert quality.tokens_by_depth == (0, 3, 3)
    # The token at place t predicts the one at t + 1: depth 1 predicted 1.0; depth 2 predicted 3.0 and 2.0.
    assert quality.nll_by_depth[1:] == (1.0, 2.5)
    assert math.isnan(quality.nll_by_depth[0])
    # Both rows have the mean NLL of the whole, so rows tell no spread.
    assert quality.nll_error == 0


def test_clustered_error_by_hand() -> None:
    # Rows of 2 tokens with means 1 and 3: residuals -2 and +2, spread 8, times 2 rows / 1, root 4, over 4 tokens.
    assert clustered_error([2.0, 6.0], [2, 2]) == pytest.approx(1.0)
    assert math.isnan(clustered_error([2.0], [2]))


def test_clustered_error_is_the_usual_one_for_equal_rows() -> None:
    sums = torch.randn(50, dtype=torch.float64) * 3 + 10
    expected = (sums / 4).std().item() / math.sqrt(50)
    assert clustered_error(sums.tolist(), [4] * 50) == pytest.approx(expected)


@pytest.mark.parametrize("router", ["vanilla", "expert_choice", "threshold_choice", "token_choice"])
def test_nll_is_cross_entropy_however_rows_are_batched(router: str) -> None:
    built, text = model(router), rows(6, 16)
    with torch.no_grad():
        output = built(text, use_cache=False)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).item()
    for sizes in ([6], [1, 5], [2, 2, 2]):
        quality = measure_quality(built, text.split(sizes), token_bytes=2 * ONE_BYTE)[0]
        assert quality.nll == pytest.approx(expected, abs=1e-5)
        assert quality.bits_per_byte == pytest.approx(expected / math.log(2) / 2, abs=1e-5)
        assert quality.mean_depth == pytest.approx(output.depths.double().mean().item())
        assert quality.num_tokens == 6 * 15
        assert quality.decision == "causal"


def test_costs_follow_the_depths() -> None:
    built, text = model(), rows(3, 16)
    with torch.no_grad():
        depths = built(text, use_cache=False).depths
    active = [[int((row > r).sum()) for r in range(3)] for row in depths]
    quality = measure_quality(built, [text], token_bytes=ONE_BYTE)[0]
    expected = sum(kv_bytes(built.config, counts, num_tokens=16) for counts in active) / 48
    assert quality.kv_bytes_per_token == pytest.approx(expected)
    expected = sum(complete_flops(built.config, 16, active=counts) for counts in active) / 48
    assert quality.flops_per_token == pytest.approx(expected)


def test_budgets_in_one_pass() -> None:
    built, read = calibrated(), []

    def batches():  # type: ignore[no-untyped-def]
        for batch in rows(8, 16, seed=5).split(4):
            read.append(len(batch))
            yield batch

    found = measure_quality(built, batches(), token_bytes=ONE_BYTE, budgets=(1.0, 2.0, 3.0))
    assert read == [4, 4]
    assert [quality.requested for quality in found] == [1.0, 2.0, 3.0]
    depths = [quality.mean_depth for quality in found]
    assert depths[0] == 1
    assert depths[2] == 3
    assert 1.6 < depths[1] < 2.4
    flops = [quality.flops_per_token for quality in found]
    assert flops == sorted(flops)


def test_attention_stays_inside_documents_if_asked() -> None:
    """The second document of a row is scored as if it stood alone."""
    text = rows(4, 20)
    text[text == 0] = 1
    text[:, 9] = 0
    (inside,) = measure_quality(model("gate"), [text], token_bytes=ONE_BYTE, end_of_text=0)
    parts = [measure_quality(model("gate"), [part], token_bytes=ONE_BYTE)[0] for part in (text[:, :10], text[:, 10:])]
    (across,) = measure_quality(model("gate"), [text], token_bytes=ONE_BYTE)
    first_of_second = inside.nll * 19 - sum(part.nll * 9 for part in parts)  # predicted from the end of the first
    logits = model("gate")(text[:, :10]).logits[:, 9].detach()
    alone = -logits.log_softmax(-1).gather(1, text[:, 10:11]).mean()
    assert first_of_second == pytest.approx(float(alone), abs=1e-3)
    assert abs(across.nll - inside.nll) > 1e-3


def test_top_k_is_labelled() -> None:
    quality = measure_quality(model(), [rows(2, 12)], token_bytes=ONE_BYTE, decision="top_k")[0]
    assert quality.decision == "top_k"
    assert quality.mean_depth == 2.0


def test_impossible_requests_are_errors() -> None:
    with pytest.raises(ValueError, match="calibrated"):
        measure_quality(model(), [rows(2, 12)], token_bytes=ONE_BYTE, budgets=(1.5,))
    with pytest.raises(ValueError, match="no predicted tokens"):
        measure_quality(model(), [], token_bytes=ONE_BYTE)
    with pytest.raises(ValueError, match="no predicted tokens"):
        measure_quality(model(), [rows(3, 1)], token_bytes=ONE_BYTE)


def test_byte_lengths_of_a_byte_tokenizer() -> None:
    lengths = token_byte_lengths(byte_tokenizer())
    assert lengths.tolist() == [1] * 256 + [0]


def test_byte_lengths_add_up_to_the_text() -> None:
    text = "naïve cafés – 日本語 12.5 €\n\tdone"
    tokenizer = train_bpe([text * 3], 280)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = token_byte_lengths(tokenizer)
    assert int(lengths[ids].sum()) == len(text.encode())
    assert int(lengths[tokenizer.eos_token_id]) == 0
