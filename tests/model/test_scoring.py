import torch

from mor.model.scoring import number_documents, score_tokens
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
