"""Streamed text equals what `generate` writes, with the depths of a full forward."""

from __future__ import annotations

import pytest
import torch

from mor.data.tokenizer import byte_tokenizer
from mor.model.calibrate import calibrate
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.show.stream import Sampling, draw, read_tokens, stream_tokens

TOKENIZER = byte_tokenizer()
PROMPT = "def f(x):\n"


@pytest.fixture(scope="module")
def model() -> MorForCausalLM:
    torch.manual_seed(0)
    config = MorConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_recursions=3,
        sharing="middle_cycle",
        router="expert_choice",
    )
    built = MorForCausalLM(config).eval()
    calibrate(built, [torch.randint(257, (8, 64))])
    return built


def greedy(**changes: object) -> Sampling:
    return Sampling(temperature=0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("mean_depth", [None, 1.0, 1.8, 3.0])
def test_greedy_stream_is_what_generate_writes(model: MorForCausalLM, mean_depth: float | None) -> None:
    ids = torch.tensor([list(PROMPT.encode())])
    options = {} if mean_depth is None else {"mean_depth": mean_depth}
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=256, eos_token_id=256, **options)
    views = list(stream_tokens(model, TOKENIZER, PROMPT, greedy(max_new_tokens=20, mean_depth=mean_depth)))
    text = "".join(view.text for view in views)
    assert text == TOKENIZER.decode([t for t in expected[0].tolist() if t != 256])
    with torch.no_grad():
        full = model(expected, use_cache=False, mean_depth=mean_depth)
    depths = full.depths[0].tolist()
    assert [view.depth for view in views][: len(depths)] == depths[: len(views)]


def test_probabilities_are_those_of_the_model(model: MorForCausalLM) -> None:
    views = read_tokens(model, TOKENIZER, PROMPT)
    ids = list(PROMPT.encode())
    with torch.no_grad():
        output = model(torch.tensor([ids]), use_cache=False)
    expected = [float(output.logits[0, i - 1].softmax(-1)[ids[i]]) for i in range(1, len(ids))]
    assert views[0].probability is None
    assert [view.probability for view in views[1:]] == pytest.approx(expected)
    assert "".join(view.text for view in views) == PROMPT


def test_the_prompt_comes_first_and_is_marked(model: MorForCausalLM) -> None:
    views = list(stream_tokens(model, TOKENIZER, PROMPT, greedy(max_new_tokens=3)))
    given = [view for view in views if view.from_prompt]
    assert "".join(view.text for view in given) == PROMPT
    assert views[: len(given)] == given


def test_drawing_is_repeatable_and_follows_the_seed(model: MorForCausalLM) -> None:
    first, again, other = (
        [v.text for v in stream_tokens(model, TOKENIZER, "a", Sampling(max_new_tokens=12, seed=seed))]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_top_p_keeps_the_likely_ones() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, Sampling(temperature=1, top_p=0.7), generator) for _ in range(200)]
    assert {token for token, _ in drawn} == {0, 1}
    assert dict(drawn)[0] == pytest.approx(0.5)
    share = sum(token == 0 for token, _ in drawn) / 200
    assert share == pytest.approx(5 / 8, abs=0.1)


def test_the_end_can_be_put_off() -> None:
    logits = torch.tensor([0.1, 5.0, 0.2])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, greedy(), generator)[0] == 1
    assert draw(logits, greedy(), generator, banned=1)[0] == 2
    drawn = {draw(logits, Sampling(), generator, banned=1)[0] for _ in range(50)}
    assert 1 not in drawn


def test_text_ends_with_the_models_longest_sequence(model: MorForCausalLM) -> None:
    views = list(stream_tokens(model, TOKENIZER, "a" * 60, greedy(max_new_tokens=50)))
    assert sum(not view.from_prompt and bool(view.text) for view in views) <= 5


def test_an_empty_prompt_begins_a_text(model: MorForCausalLM) -> None:
    views = list(stream_tokens(model, TOKENIZER, "", greedy(max_new_tokens=2)))
    assert views[0].from_prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_sampling(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_texts_that_do_not_fit(model: MorForCausalLM) -> None:
    with pytest.raises(ValueError, match="64"):
        list(stream_tokens(model, TOKENIZER, "a" * 64, greedy()))
    with pytest.raises(ValueError, match="at most 64"):
        read_tokens(model, TOKENIZER, "a" * 65)
    with pytest.raises(ValueError, match="empty"):
        read_tokens(model, TOKENIZER, "")
    with pytest.raises(ValueError, match="impossible"):
        list(stream_tokens(model, TOKENIZER, "a", greedy(mean_depth=3.5)))
