"""Depths by kind and place, similar keys, and test-time scaling, against values computed otherwise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.evaluate.depth_profile import depth_profile
from mor.evaluate.kv_similarity import kv_similarity
from mor.evaluate.recursion_scaling import can_scale, recursion_scaling, with_recursions
from mor.evaluate.token_kinds import KINDS, kind_of, token_kinds
from mor.model.modeling_mor import MorForCausalLM
from tests.evaluate.models import VOCABULARY, calibrated, model, rows

HALVES = torch.arange(VOCABULARY) % 2


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "article"),
        (" The", "article"),
        (" of", "preposition"),
        (" were", "auxiliary"),
        (" dogs", "lower-case word"),
        (" Paris", "capitalised word"),
        ("ing", "inside a word"),
        ("the", "inside a word"),
        (" ,", "punctuation"),
        (").", "punctuation"),
        ("42", "digits"),
        ("\n\n", "space"),
        ("\ufffd", "inside a word"),
        (" été", "lower-case word"),
    ],
)
def test_kinds_of_tokens(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_kinds_of_a_vocabulary() -> None:
    tokenizer = train_bpe(["the cat sat on the mat, and the dog sat with the cat. " * 20], 270)
    kinds = token_kinds(tokenizer)
    ids = tokenizer(" the cat sat, 7", add_special_tokens=False)["input_ids"]
    found = [KINDS[kinds[index]] for index in ids]
    assert found[0] == "article"
    assert found[-1] == "digits"
    assert "punctuation" in found
    assert KINDS[kinds[tokenizer.eos_token_id]] == "end"
    assert len(token_kinds(byte_tokenizer())) == 257


def test_depths_by_kind_are_counted() -> None:
    built, text = model(), rows(6, 20)
    profile = depth_profile(built, text.split(4), HALVES, ("even", "odd"))
    with torch.no_grad():
        depths = built(text, use_cache=False).depths
    for number, name in enumerate(("even", "odd")):
        chosen = depths[text % 2 == number]
        assert profile.by_kind[name] == tuple(torch.bincount(chosen, minlength=4).tolist())
        assert profile.mean_depth(name) == pytest.approx(float(chosen.double().mean()))


def test_places_are_shares_and_dead_ones_are_told() -> None:
    built, text = model(), rows(3, 20)
    profile = depth_profile(built, [text], HALVES, ("even", "odd"))
    with torch.no_grad():
        depths = built(text, use_cache=False).depths
    assert profile.place_width == 1
    for recursion in range(3):
        taken = (depths > recursion).double().mean(0)
        assert [place[recursion] for place in profile.by_place] == pytest.approx(taken.tolist())
        assert profile.dead[recursion] == pytest.approx(float((taken == 0).double().mean()))
    assert profile.dead[0] == 0 < profile.dead[2], "the example should have dead places"


def test_long_rows_are_drawn_in_stretches() -> None:
    built = model("gate", max_position_embeddings=200)
    profile = depth_profile(built, [rows(2, 150)], HALVES, ("even", "odd"))
    assert profile.place_width == 3
    assert len(profile.by_place) == 50
    with pytest.raises(ValueError, match="needs rows"):
        depth_profile(built, [], HALVES, ("even", "odd"))


def test_a_budget_moves_depths() -> None:
    low, high = (
        depth_profile(calibrated(), [rows(8, 32, seed=7)], HALVES, ("even", "odd"), mean_depth=m) for m in (1.2, 2.8)
    )
    assert low.mean_depth("even") + 1 < high.mean_depth("even")


@pytest.mark.parametrize("router", ["none", "expert_choice", "threshold_choice", "token_choice", "gate"])
def test_keys_are_as_alike_as_the_caches_say(router: str) -> None:
    """Against the keys in a cache, which are rotated: the same angle for the same token leaves the cosine alone."""
    built, row = model(router), rows(1, 24)
    found = kv_similarity(built, row)
    assert found is not None
    with torch.no_grad():
        output = built(row, use_cache=True)
    depths, cache = output.depths[0], output.past_key_values
    sums = torch.zeros(2)
    plan = built.config.depth_plan
    active = [(depths > r).nonzero().squeeze(1) for r in range(3)]
    both = active[1][torch.isin(active[1], active[2])]
    for layer in range(plan.block_size):
        for kind in range(2):
            sides = []
            for r in (1, 2):
                entries = cache.sequence(r).read(plan.application(r, layer), None, len(active[r]))[kind]
                flat = entries[0].transpose(0, 1).flatten(1)
                sides.append(flat[torch.isin(active[r], both)])
            sums[kind] += F.cosine_similarity(*sides, dim=-1).mean() / plan.block_size
    if len(both):
        assert found.keys[1][2] == found.keys[2][1] == pytest.approx(float(sums[0]), abs=1e-4)
        assert found.values[1][2] == pytest.approx(float(sums[1]), abs=1e-4)
    assert found.keys[0][0] == pytest.approx(1.0)


def test_shared_keys_have_no_similarity() -> None:
    assert kv_similarity(model(kv_cache="shared"), rows(1, 8)) is None
    assert kv_similarity(model("vanilla"), rows(1, 8)) is None


def nll(built: MorForCausalLM, text: torch.Tensor) -> float:
    with torch.no_grad():
        logits = built(text, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).item()


def test_all_tokens_take_as_many_recursions_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    depths, forward = [], MorForCausalLM.forward

    def spy(self, input_ids, **options):  # type: ignore[no-untyped-def]
        output = forward(self, input_ids, **options)
        depths.append(set(output.depths.flatten().tolist()))
        return output

    monkeypatch.setattr(MorForCausalLM, "forward", spy)
    points = recursion_scaling(model(), rows(4, 16).split(4))
    assert depths == [{1}, {2}, {3}]
    assert [point.recursions for point in points] == [1, 2, 3]
    assert len({point.nll for point in points}) == 3


def test_a_model_without_a_router_goes_beyond_its_training() -> None:
    built, text = model("none"), rows(4, 16)
    points = recursion_scaling(built, text.split(2), beyond=2)
    assert [point.is_trained for point in points] == [True, True, True, False, False]
    assert points[2].nll == pytest.approx(nll(built, text), abs=1e-5)
    five = with_recursions(built, 5)
    assert points[4].nll == pytest.approx(nll(five, text), abs=1e-5)
    assert five.config.num_hidden_layers == 2 + 5 * 2
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), five.parameters(), strict=True))
    assert not math.isnan(points[0].nll_error)


def test_what_cannot_scale_says_so() -> None:
    assert not can_scale(model("token_choice"))
    assert not can_scale(model("vanilla"))
    with pytest.raises(ValueError, match="router='token_choice' with 3 recursions"):
        recursion_scaling(model("token_choice"), [rows(1, 8)])
    with pytest.raises(ValueError, match="needs rows"):
        recursion_scaling(model(), [])
