import copy

import pytest
import torch

from mor.data.loader import Batch
from mor.train.step import accumulate_gradients
from tests.tiny import random_ids, tiny_model

ROWS = random_ids(4, 24)
DOCUMENTS = torch.arange(24).expand(4, 24) // 10

ROUTERS = {
    "none": {},
    "recursive": {"sharing": "middle_cycle"},
    "expert_choice": {"router": "expert_choice", "router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.5},
    "auxiliary_router": {"router": "expert_choice", "causal_method": "aux_router"},
    "shared_kv": {"router": "expert_choice", "kv_cache": "shared"},
    "threshold_choice": {"router": "threshold_choice", "causal_method": "none", "router_z_loss_coef": 0.1},
    "token_choice": {"router": "token_choice", "balancing": "none", "router_z_loss_coef": 0.1},
    "loss_free": {"router": "token_choice", "balancing": "loss_free"},
    "random": {"router": "random"},
    "fixed": {"router": "fixed"},
    "gate": {"router": "gate"},
}


def batches(size, *, documents=False):
    ids = DOCUMENTS.split(size) if documents else [None] * (4 // size)
    return [Batch(input_ids=rows, document_ids=d, epoch=0) for rows, d in zip(ROWS.split(size), ids)]


def gradients(model, cut):
    model = copy.deepcopy(model).train()
    if model.config.router == "random":
        model.model.recursion.router.eval()  # scores by position instead of by draw
    values = accumulate_gradients(model, cut, dtype=torch.float32)
    return values, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_a_step_is_the_same_however_its_rows_are_cut(settings, documents):
    model = tiny_model(**settings)
    whole_values, whole = gradients(model, batches(4, documents=documents))
    assert {"loss", "loss/lm"} <= whole_values.keys()
    for size in (1, 2):
        values, cut = gradients(model, batches(size, documents=documents))
        assert values.keys() == whole_values.keys()
        for name in values:
            torch.testing.assert_close(values[name], whole_values[name], rtol=0, atol=1e-6, msg=name)
        for name in cut:
            torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_targets_plus_weighted_router_losses():
    model = tiny_model(router="expert_choice", router_z_loss_coef=0.1, router_aux_loss_coef=0.5).train()
    values, _ = gradients(model, batches(1))
    plain = model(input_ids=ROWS, labels=ROWS)
    assert values["loss/lm"].item() == pytest.approx(plain.losses["lm"].item(), abs=1e-6)
    assert values["loss/sampling"].item() == pytest.approx(plain.losses["sampling"].item(), abs=1e-6)
    assert values["loss"].item() == pytest.approx(plain.loss.item(), abs=1e-6)


def test_document_masking_reaches_the_model():
    model = tiny_model()
    crossing, inside = (gradients(model, batches(4, documents=d))[0]["loss"] for d in (False, True))
    assert abs(float(crossing - inside)) > 1e-4


def test_auxiliary_losses_do_not_grow_with_accumulation():
    """The authors' code multiplies them by the number of micro-batches (golden/official behaviour, section 8)."""
    model = tiny_model(router="expert_choice", router_aux_loss_coef=10.0)
    (_, whole), (_, cut) = gradients(model, batches(4)), gradients(model, batches(1))
    name = "model.recursion.router.heads.1.0.weight"
    assert float(cut[name].norm() / whole[name].norm()) == pytest.approx(1.0, abs=1e-4)
