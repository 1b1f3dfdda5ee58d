import pytest
import torch

from mor.model import scoring
from mor.model.scoring import number_documents, rows_at_once, score_tokens
from tests.tiny import left_padding, random_ids, tiny_model


def test_scores_are_the_models_log_probabilities():
    model, ids = tiny_model(router="expert_choice"), random_ids(2, 9)
    scores = score_tokens(model.train(), ids)
    assert model.training
    output = model.eval()(ids)
    expected = -output.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(scores.nll_BT[:, 1:], expected)
    assert (scores.nll_BT[:, 0] == 0).all() and scores.counted_BT.sum() == 16
    assert torch.equal(scores.depths_BT, output.depths)


def test_padding_is_not_counted_and_the_rule_is_obeyed():
    model, ids, mask = tiny_model(router="expert_choice"), random_ids(2, 9), left_padding(0, 4, size=9)
    scores = score_tokens(model, ids, attention_mask=mask, decision="top_k")
    assert scores.counted_BT.sum().item() == 8 + 4
    assert (scores.nll_BT[~scores.counted_BT] == 0).all()
    assert (scores.depths_BT > 2).sum().item() == 3 + 1


def test_documents_end_with_their_end_of_text_token():
    ids = torch.tensor([[5, 0, 6, 7, 0, 0], [1, 2, 3, 4, 5, 6]])
    assert number_documents(ids, 0).tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6]
    assert number_documents(ids[:, :1], 0).tolist() == [[0], [0]]


def test_attention_stays_inside_documents_if_asked():
    model, ids = tiny_model(router="gate"), random_ids(1, 12)
    ids[0, 5] = 0
    inside = score_tokens(model, ids, end_of_text=0).nll_BT
    torch.testing.assert_close(inside[0, 7:], score_tokens(model, ids[:, 6:]).nll_BT[0, 1:])
    assert (score_tokens(model, ids).nll_BT - inside)[0, 7:].abs().max() > 1e-3


@pytest.mark.parametrize("limit", [1, 64 * 5, 64 * 27])
def test_logits_are_made_a_few_rows_at_a_time(limit, monkeypatch):
    model, ids = tiny_model(router="expert_choice"), random_ids(3, 9)
    whole, made = score_tokens(model, ids), []
    linear = torch.nn.functional.linear

    def spy(x, weight, *rest):
        made.extend([x.shape[:-1].numel()] if weight is model.lm_head.weight else [])
        return linear(x, weight, *rest)

    monkeypatch.setattr(scoring, "LOGITS", limit)
    monkeypatch.setattr(scoring.F, "linear", spy)
    parts = score_tokens(model, ids)
    assert sum(made) == 27 and max(made) == max(1, limit // 64)
    torch.testing.assert_close(parts.nll_BT, whole.nll_BT)


def test_wide_models_and_long_rows_are_scored_fewer_at_a_time():
    model = tiny_model(hidden_size=32, intermediate_size=1024)
    assert rows_at_once(model, 512) == 2**23 // (4 * 1024 * 512) == 4
    assert rows_at_once(model, 1024) == 2
    assert rows_at_once(model, 10**6) == 1
