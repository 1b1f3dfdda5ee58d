"""A text scored as a whole, in parts and under top-k, in one pass."""

from __future__ import annotations

import pytest
import torch

from mor.evaluate.evaluation import evaluate_text
from mor.evaluate.perplexity import measure_quality
from mor.evaluate.text import HeldOut
from mor.model.modeling_mor import MorForCausalLM
from tests.evaluate.models import VOCABULARY, calibrated, model, rows

TOKEN_BYTES = torch.arange(VOCABULARY) % 3 + 1


def held_out(batch: int = 6, length: int = 16) -> HeldOut:
    """Rows that are a document each, of two domains in turn."""
    return HeldOut(
        rows_NT=rows(batch, length),
        document_NT=torch.arange(batch)[:, None].expand(batch, length),
        domain_D=torch.arange(batch) % 2,
        domains=("even", "odd"),
    )


def test_the_whole_is_what_measure_quality_says() -> None:
    """Rows are documents here, so errors are the same too."""
    built, text = calibrated(), held_out()
    budgets = (None, 1.5)
    found = evaluate_text(built, text, token_bytes=TOKEN_BYTES, budgets=budgets, batch_size=4)
    expected = measure_quality(built, [text.rows_NT], token_bytes=TOKEN_BYTES, budgets=budgets)
    for evaluation, quality in zip(found, expected, strict=True):
        assert evaluation.quality.requested == quality.requested
        for name in ("nll", "nll_error", "bits_per_byte", "mean_depth", "flops_per_token", "kv_bytes_per_token"):
            assert getattr(evaluation.quality, name) == pytest.approx(getattr(quality, name), rel=1e-5), name
        assert evaluation.total.nll == pytest.approx(quality.nll, rel=1e-5)
        assert evaluation.gap is None


def test_parts_are_weighted_means_of_the_whole() -> None:
    (found,) = evaluate_text(model(), held_out(), token_bytes=TOKEN_BYTES)
    assert [part.name for part in found.by_domain] == ["even", "odd"]
    for parts in found.parts.values():
        count = sum(part.num_tokens for part in parts)
        assert count == found.total.num_tokens == 6 * 15
        assert sum(part.nll * part.num_tokens for part in parts) / count == pytest.approx(found.total.nll, rel=1e-5)
        assert sum(part.num_bytes for part in parts) == found.total.num_bytes


def test_a_domain_is_what_its_rows_alone_give() -> None:
    built, text = model(), held_out()
    (found,) = evaluate_text(built, text, token_bytes=TOKEN_BYTES)
    (alone,) = measure_quality(built, [text.rows_NT[::2]], token_bytes=TOKEN_BYTES)
    assert found.by_domain[0].nll == pytest.approx(alone.nll, rel=1e-5)
    assert found.by_domain[0].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)


def test_slices_by_depth_are_of_the_token_that_predicts() -> None:
    built, text = model(), held_out()
    (found,) = evaluate_text(built, text, token_bytes=TOKEN_BYTES)
    with torch.no_grad():
        depths = built(text.rows_NT, use_cache=False).depths[:, :-1]
    expected = {f"depth {d}": int((depths == d).sum()) for d in (1, 2, 3) if (depths == d).any()}
    assert {part.name: part.num_tokens for part in found.by_depth} == expected


def test_the_gap_is_between_causal_and_top_k_at_each_budget() -> None:
    built, text = calibrated(), held_out()
    found = evaluate_text(built, text, token_bytes=TOKEN_BYTES, budgets=(1.5, 2.0), with_gap=True)
    for evaluation, budget in zip(found, (1.5, 2.0), strict=True):
        args = {"token_bytes": TOKEN_BYTES, "budgets": (budget,)}
        (causal,), (top) = (
            measure_quality(built, [text.rows_NT], **args),
            measure_quality(built, [text.rows_NT], decision="top_k", **args),
        )
        assert evaluation.gap is not None
        assert evaluation.gap.nll == pytest.approx(causal.nll - top[0].nll, abs=1e-5)
        assert evaluation.gap.nll != 0


@pytest.mark.parametrize("router", ["vanilla", "none", "token_choice"])
def test_routers_without_top_k_have_no_gap(router: str) -> None:
    (found,) = evaluate_text(model(router), held_out(), token_bytes=TOKEN_BYTES, with_gap=True)
    assert found.gap is None


def test_the_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two budgets and two rules on two batches are eight forwards, all on the same two batches."""
    seen, forward = [], MorForCausalLM.forward

    def spy(self, input_ids, **options):  # type: ignore[no-untyped-def]
        seen.append((input_ids.tolist(), options["decision"], options["mean_depth"]))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(MorForCausalLM, "forward", spy)
    built, text = calibrated(), held_out()
    seen.clear()
    evaluate_text(built, text, token_bytes=TOKEN_BYTES, budgets=(1.5, 2.0), with_gap=True, batch_size=3)
    assert [len(ids) for ids, _, _ in seen] == [3] * 8
    assert len({str(ids) for ids, _, _ in seen[:4]}) == 1
