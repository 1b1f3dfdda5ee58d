import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mor.model.modeling_mor import MorForCausalLM
from mor.model.routing import ScoreHead
from tests.tiny import architectures, label, left_padding, random_ids, tiny_config, tiny_model

ROUTED = dict(router="expert_choice", sharing="middle_cycle")


def num_storages(model):
    return len({p.data_ptr() for p in model.parameters()})


def expected_storages(model):
    """One per weight of each unique layer, embedding, final norm and score head; a tied head adds none."""
    config = model.config
    per_layer = 9
    heads = [m for m in model.modules() if isinstance(m, ScoreHead)]
    return per_layer * config.depth_plan.num_unique_layers + 2 + sum(len(list(h.parameters())) for h in heads)


@pytest.mark.parametrize("architecture", architectures(), ids=label)
def test_every_weight_is_stored_once(architecture, tmp_path):
    model = tiny_model(**architecture)
    expected = expected_storages(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for copied in (model, loaded, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        assert num_storages(copied) == expected
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert num_storages(model) == expected


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_saving_round_trips_bit_for_bit(tmp_path, size, tied):
    model, ids = tiny_model(tie_word_embeddings=tied, **ROUTED), random_ids(2, 12)
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    stored = [key for file in files for key in load_file(file)]
    assert ("lm_head.weight" in stored) == (not tied)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), loaded.state_dict()[key].nan_to_num(7)), key
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_router_buffers_missing_from_a_checkpoint_start_fresh(tmp_path):
    model = tiny_model(router="token_choice", balancing="loss_free")
    state = {k: v for k, v in model.state_dict().items() if "router" not in k or "head" in k}
    loaded = MorForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    router = loaded.model.recursion.router
    assert router.calibration_mean_depth.isnan().all() and router.load_bias.tolist() == [0, 0, 0]
    assert router.load_sum.tolist() == [0, 0, 0] and router.training_forwards.item() == 0


@pytest.mark.parametrize("router", ["expert_choice", "threshold_choice", "token_choice"])
def test_thresholds_and_biases_stay_float32_in_a_bfloat16_model(router, tmp_path):
    model = tiny_model(router=router, balancing="loss_free")
    buffers = dict(model.model.recursion.router.named_buffers())
    for buffer in buffers.values():
        if buffer.is_floating_point():
            buffer.uniform_(0.1, 0.2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (loaded, copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).bfloat16()):
        assert cast.lm_head.weight.dtype == torch.bfloat16
        for name, buffer in cast.model.recursion.router.named_buffers():
            if name not in ("load_sum", "boundary_sum"):
                assert torch.equal(buffer, buffers[name]), name
        assert cast(random_ids(1, 6)).logits.dtype == torch.bfloat16


def llama_twin():
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps",
             "tie_word_embeddings", "eos_token_id", "pad_token_id")  # fmt: skip
    model = tiny_model()
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names})).eval()
    names = {"model.layers.": "model.recursion.block."}
    state = {key.replace(*next(iter(names.items()))): value for key, value in llama.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model, llama


@torch.no_grad()
def test_arguments_behave_as_in_llama():
    model, llama = llama_twin()
    ids, mask = random_ids(2, 10), left_padding(0, 4, size=10)
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for inputs in (
        dict(input_ids=ids),
        dict(input_ids=ids, attention_mask=mask),
        dict(input_ids=ids, attention_mask=mask, position_ids=positions),
        dict(inputs_embeds=model.model.embed_tokens(ids)),
    ):
        a, b = (m(**inputs, labels=ids, output_hidden_states=True) for m in (model, llama))
        torch.testing.assert_close(a.logits[real], b.logits[real], atol=1e-5, rtol=1e-5)
        assert len(a.hidden_states) == len(b.hidden_states) == 9
        for mine, theirs in zip(a.hidden_states, b.hidden_states, strict=True):
            torch.testing.assert_close(mine[real], theirs[real], atol=1e-5, rtol=1e-5)
        if "attention_mask" not in inputs:
            torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)
    for keep in (1, 3, torch.tensor([2, 5])):
        a, b = (m(ids, logits_to_keep=keep).logits for m in (model, llama))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
        llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
    )


def test_labels_shift_and_ignore_and_sum_over_the_batch():
    model, ids = tiny_model(**ROUTED), random_ids(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    logprob = output.logits.log_softmax(-1)
    nll = -logprob[:, 3:-1].gather(-1, ids[:, 4:, None]).squeeze(-1)
    torch.testing.assert_close(output.loss, nll.mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=20).loss, nll.sum() / 20)


@pytest.mark.parametrize("architecture", architectures(), ids=label)
def test_gradient_checkpointing_changes_nothing(architecture):
    model, ids = tiny_model(**architecture).train(), random_ids(2, 14)
    plain = copy.deepcopy(model)
    model._set_gradient_checkpointing(True, torch.utils.checkpoint.checkpoint)
    gradients = []
    for m, kwargs in ((plain, {}), (model, {})):
        torch.manual_seed(1)
        if m is model:
            enable = getattr(m, "activation_checkpointing_enable", None) or m.gradient_checkpointing_enable
            enable()
        m(ids, labels=ids, **kwargs).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpoints_are_refused():
    model = tiny_model(**ROUTED)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with pytest.raises(ValueError, match="use_reentrant=True would drop"):
        enable({"use_reentrant": True})


def test_documents_do_not_see_each_other():
    for kv_cache in ("recursion", "shared", "hybrid"):
        model = tiny_model(router="fixed", fixed_depths=[3, 1, 2], kv_cache=kv_cache)
        ids = random_ids(1, 12)
        documents = torch.tensor([[0] * 6 + [1] * 6])
        joined = model(ids, document_ids=documents, use_cache=False).logits
        changed = ids.clone()
        changed[0, :6] = (changed[0, :6] % 60) + 1
        torch.testing.assert_close(model(changed, document_ids=documents, use_cache=False).logits[:, 6:], joined[:, 6:])
        assert (
            model(changed, use_cache=False).logits[:, 6:] - model(ids, use_cache=False).logits[:, 6:]
        ).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", architectures(), ids=label)
@torch.no_grad()
def test_documents_in_a_batch_are_as_alone(architecture):
    model, ids = tiny_model(**architecture), random_ids(3, 14)
    documents = torch.tensor([[0] * 5 + [1] * 9, [0] * 14, [0, 1] * 2 + [2] * 10])
    together = model(ids, document_ids=documents, use_cache=False)
    for row in range(3):
        alone = model(ids[row : row + 1], document_ids=documents[row : row + 1], use_cache=False)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(input_ids=torch.tensor([[1, 99]])), r"token 99 is outside the vocabulary 0\.\.63"),
        (dict(input_ids=torch.tensor([[1, -1]])), "token -1 is outside"),
        (dict(), "exactly one of input_ids and inputs_embeds"),
        (dict(input_ids=random_ids(2, 5), attention_mask=torch.ones(2, 4)), r"shape \(2, 4\); expected \(2, 5\)"),
        (dict(input_ids=random_ids(1, 5), output_attentions=True), "output_attentions=True is not supported"),
        (dict(input_ids=random_ids(1, 5), attention_maks=1), "does not take attention_maks"),
        (dict(input_ids=random_ids(1, 5), decision="topk"), "decision='topk' does not exist"),
        (dict(input_ids=random_ids(1, 5), document_ids=random_ids(1, 5), use_cache=True), "cannot be combined"),
        (dict(input_ids=random_ids(1, 5), past_key_values=((),)), "must be a MorCache, got tuple"),
    ],
)
def test_bad_inputs_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**ROUTED)(**kwargs)


def test_decisions_a_model_does_not_have_are_refused():
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match=r"decision='top_k' needs a router"):
        tiny_model()(ids, decision="top_k")
    with pytest.raises(ValueError, match=r"mean_depth=2\.0 needs a router"):
        tiny_model()(ids, mean_depth=2.0)
    with pytest.raises(ValueError, match=r"decision='top_k' does not exist for router='token_choice'"):
        tiny_model(router="token_choice")(ids, decision="top_k")
    with pytest.raises(ValueError, match="router='gate' has a fixed depth"):
        tiny_model(router="gate")(ids, mean_depth=2.0)


def test_training_decides_by_top_k_and_evaluation_causally():
    model, ids = tiny_model(**ROUTED), random_ids(2, 12)
    top_k = model(ids, decision="top_k").depths
    assert top_k.sum(1).tolist() == [12 + 8 + 4] * 2
    assert torch.equal(model.train()(ids).depths, top_k)
    causal = model.eval()(ids).depths
    assert torch.equal(causal, model(ids, decision="causal").depths) and not torch.equal(causal, top_k)


def test_tuples_on_request():
    model, ids = tiny_model(**ROUTED), random_ids(1, 5)
    output = model(ids, labels=ids, return_dict=False)
    assert isinstance(output, tuple) and output[0].dim() == 0 and output[1].shape == (1, 5, 64)


def test_config_alone_builds_the_same_architecture():
    config = tiny_config(**ROUTED)
    assert type(AutoModelForCausalLM.from_config(config)) is MorForCausalLM
