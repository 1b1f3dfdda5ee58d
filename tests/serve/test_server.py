"""OpenAI's interface: what comes back is what the engine says, whole or streamed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mor.engine.params import SamplingParams
from mor.evaluate.backends import ModelBackend
from mor.serve.replies import ChatChunk, ChatCompletion, Completion, ModelList
from tests.serve.serving import TEMPLATE, Running, error_of, events
from tests.serve.sources import MAX_LENGTH
from tests.serve.tiny_engine import TOKENIZER, make_engine, make_model

GREEDY = dict(temperature=0, ignore_eos=True)


def test_a_completion_is_the_engine_s(server: Running) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=5, logprobs=2, mean_depth=1.5)
    [expected] = make_engine().generate(["once upon"], params, progress=False)
    reply = server.complete("once upon", max_tokens=12, temperature=0.9, seed=5, logprobs=2, mean_depth=1.5).json()
    Completion.model_validate(reply)
    [choice] = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert choice["depths"] == [token.depth for token in expected.tokens]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)
    assert choice["logprobs"]["text_offset"] == [token.offset for token in expected.tokens]
    assert reply["usage"]["mean_depth"] == pytest.approx(expected.mean_depth)
    assert reply["usage"]["completion_tokens"] == 12 and reply["usage"]["prompt_tokens"] == 9


def test_depth_follows_the_dial(server: Running) -> None:
    depths = [
        server.complete("a long enough text", max_tokens=60, seed=1, mean_depth=dial).json()["usage"]["mean_depth"]
        for dial in (1, 2, 3)
    ]
    assert depths[0] == 1 and depths[2] == 3 and 1 < depths[1] < 3
    limited = server.complete("a long enough text", max_tokens=60, seed=1, mean_depth=3, max_recursions=2).json()
    assert max(limited["choices"][0]["depths"]) == 2


def test_a_stream_says_what_the_whole_does(server: Running) -> None:
    fields = dict(max_tokens=20, seed=3, n=2, logprobs=1)
    whole = server.complete("abc", **fields).json()
    chunks = events(server.complete("abc", **fields, stream=True, stream_options={"include_usage": True}))
    assert all(Completion.model_validate(chunk) for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    last = chunks.pop()
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 40
    assert {**last["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        choice = whole["choices"][index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [depth for part in mine for depth in part["depths"]] == choice["depths"]
        assert [token for part in mine for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_usage_in_every_chunk(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.complete("abc", max_tokens=5, ignore_eos=True, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 5


def test_several_prompts(server: Running) -> None:
    prompts = ["first", "second prompt"]
    together = server.complete(prompts, max_tokens=6, **GREEDY).json()
    alone = [server.complete(prompt, max_tokens=6, **GREEDY).json()["choices"][0] for prompt in prompts]
    assert [choice["index"] for choice in together["choices"]] == [0, 1]
    assert [choice["text"] for choice in together["choices"]] == [choice["text"] for choice in alone]
    assert together["usage"]["prompt_tokens"] == 5 + 13
    many = server.complete(prompts, max_tokens=3, n=2, seed=1).json()["choices"]
    assert [choice["index"] for choice in many] == [0, 1, 2, 3]
    assert many[2]["text"] == server.complete("second prompt", max_tokens=3, n=2, seed=1).json()["choices"][0]["text"]


@pytest.mark.parametrize("prompt", [[97, 98, 99], "abc", ["abc"], [[97, 98, 99]]])
def test_prompts_as_text_and_as_tokens(server: Running, prompt: object) -> None:
    first = server.complete("abc", max_tokens=5, **GREEDY).json()["choices"][0]["text"]
    assert server.complete(prompt, max_tokens=5, **GREEDY).json()["choices"][0]["text"] == first


def test_no_prompt_is_the_beginning_of_a_text(server: Running) -> None:
    texts = [
        server.complete(prompt, max_tokens=5, **GREEDY).json()["choices"][0]["text"] for prompt in ("", None, [256])
    ]
    assert len(set(texts)) == 1


def test_stop_strings(server: Running) -> None:
    text = server.complete("abc", max_tokens=30, seed=2, ignore_eos=True).json()["choices"][0]["text"]
    stop = text[10:12]
    choice = server.complete("abc", max_tokens=30, seed=2, ignore_eos=True, stop=[stop]).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_an_echo_with_log_probabilities_scores_the_prompt(server: Running) -> None:
    prompt = "some given text"
    choice = server.complete(prompt, max_tokens=4, echo=True, logprobs=1, **GREEDY).json()["choices"][0]
    assert choice["text"].startswith(prompt)
    logprobs, size = choice["logprobs"], len(prompt)
    assert all(len(values) == size + 4 for values in (*logprobs.values(), choice["depths"]))
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][:size] == list(range(size))
    again = server.complete(prompt[:8], max_tokens=1, echo=True, logprobs=1, **GREEDY).json()["choices"][0]["logprobs"]
    assert again["token_logprobs"][1:8] == pytest.approx(logprobs["token_logprobs"][1:8], abs=1e-4)
    greedy = server.complete(prompt, max_tokens=1, logprobs=1, **GREEDY).json()["choices"][0]
    generated = server.complete(prompt + greedy["text"], max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    if len(greedy["text"]) == 1 and greedy["text"].isascii():
        assert generated["logprobs"]["token_logprobs"][-1] == pytest.approx(
            greedy["logprobs"]["token_logprobs"][0], abs=1e-4
        )
        assert generated["depths"][-1] == greedy["depths"][0]


@pytest.mark.parametrize("dial", [{}, {"mean_depth": 1.5}, {"mean_depth": 3, "max_recursions": 2}])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_says_what_the_engine_does(server: Running, max_tokens: int, dial: dict[str, float]) -> None:
    """As the harness asks: token ids of several prompts, whose tokens are given and greedy ones named."""
    prompts = [list(b"a context and its continuation"), [97], list(b"another text")]
    params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=2, prompt_logprobs=2, **dial)  # type: ignore[arg-type]
    expected = make_engine().generate(prompts, params, progress=False)
    fields = dict(max_tokens=max_tokens, temperature=0, logprobs=2, seed=1234, echo=True, **dial)
    reply = server.complete(prompts, **fields).json()
    Completion.model_validate(reply)
    assert reply["usage"]["completion_tokens"] == 3 * max_tokens
    for choice, prompt, output in zip(reply["choices"], prompts, expected, strict=True):
        logprobs, told = choice["logprobs"], [*output.prompt_logprobs, *(token.logprob for token in output.tokens)]
        assert logprobs["token_logprobs"][0] is None and told[0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(told[1:], abs=1e-4)
        tops = [*output.prompt_tops, *(token.top_logprobs for token in output.tokens)]
        for named, top in zip(logprobs["top_logprobs"][1:], tops[1:], strict=True):
            assert list(named.values())[:2] == pytest.approx([value for _, value in top], abs=1e-4)
        assert choice["depths"] == [*output.prompt_depths, *output.depths]
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(prompt) + max_tokens
        assert choice["finish_reason"] == "length"


@pytest.mark.filterwarnings("ignore")
def test_the_harness_s_client_gets_the_model_s_log_likelihoods(server: Running) -> None:
    """What `lm_eval --model local-completions` sends, and what it reads in the answer."""
    harness = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    pairs = [(b"the context", b" and more"), (b"a", b"b"), (b"another context", b".")]
    rows = [list(context + continuation) for context, continuation in pairs]
    payload = harness._create_payload(SimpleNamespace(model="tiny"), rows)
    reply = server.client.post("/v1/completions", json=payload).json()
    found = harness.parse_logprobs(reply, ctxlens=[len(context) for context, _ in pairs])
    expected = ModelBackend(make_model(), end_of_text=256).loglikelihoods(pairs)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-3)


def test_every_choice_of_an_echo_has_the_prompt_s_log_probabilities(server: Running) -> None:
    choices = server.complete(["one", "other"], max_tokens=2, n=2, echo=True, logprobs=0, seed=1).json()["choices"]
    each = [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert [len(values) for values in each] == [5, 5, 7, 7]
    assert each[0][1:3] == pytest.approx(each[1][1:3], abs=1e-5)
    assert each[2][1:5] == pytest.approx(each[3][1:5], abs=1e-5)


def test_a_prompt_that_is_scored_alone_may_be_as_long_as_the_model_allows(server: Running) -> None:
    reply = server.complete([5] * MAX_LENGTH, max_tokens=0, echo=True, logprobs=0).json()
    assert len(reply["choices"][0]["logprobs"]["token_logprobs"]) == MAX_LENGTH
    for size, most, rest in ((MAX_LENGTH + 1, 0, "fit"), (MAX_LENGTH, 1, "fit beside one of output")):
        error = error_of(server.complete([5] * size, max_tokens=most, echo=True, logprobs=0), 400)
        assert error["code"] == "context_length_exceeded" and error["message"].endswith(f"{MAX_LENGTH - most} {rest}")


def test_an_echo_alone(server: Running) -> None:
    choice = server.complete(["given", "text"], max_tokens=0, echo=True).json()["choices"]
    assert [one["text"] for one in choice] == ["given", "text"]


def test_a_chat(server: Running) -> None:
    prompt = "<user>Hello<assistant>"
    expected = server.complete(prompt, max_tokens=10, seed=1, logprobs=2).json()
    reply = server.chat("Hello", max_completion_tokens=10, seed=1, logprobs=True, top_logprobs=2).json()
    ChatCompletion.model_validate(reply)
    [choice], [same] = reply["choices"], expected["choices"]
    assert choice["message"] == {"role": "assistant", "content": same["text"]}
    assert choice["depths"] == same["depths"] == [token["depth"] for token in choice["logprobs"]["content"]]
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == same["logprobs"]["token_logprobs"]
    assert [token["text_offset"] for token in choice["logprobs"]["content"]] == same["logprobs"]["text_offset"]
    assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])
    assert reply["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_streams(server: Running) -> None:
    whole = server.chat("Hi", max_tokens=10, seed=4).json()["choices"][0]["message"]["content"]
    chunks = events(server.chat("Hi", max_tokens=10, seed=4, stream=True))
    assert all(ChatChunk.model_validate(chunk) for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == whole


def test_a_chat_goes_on_as_long_as_the_model_can(server: Running) -> None:
    reply = server.chat("x" * 230, ignore_eos=True).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == MAX_LENGTH


def test_parts_are_put_together(server: Running) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
    reply = server.client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0] == server.chat("Hello", max_tokens=4, temperature=0).json()["choices"][0]


def test_the_template_gets_names(server: Running) -> None:
    turn = {"role": "user", "content": "Hello"}
    texts = [
        server.client.post("/tokenize", json={"messages": [turn | named]}).json()["tokens"]
        for named in ({}, {"name": None}, {"name": "Ann"})
    ]
    assert texts[0] == texts[1] and TOKENIZER.decode(texts[2]) == "<user Ann>Hello<assistant>"


def test_what_the_template_refuses(server: Running) -> None:
    body = {"messages": [{"role": "developer", "content": "x"}]}
    error = error_of(server.client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "messages" and "no developers" in error["message"]


def test_models(server: Running) -> None:
    listing = ModelList.model_validate(server.client.get("/v1/models").json())
    [card] = listing.data
    assert (card.id, card.max_model_len, card.num_recursions) == ("tiny", MAX_LENGTH, 3)
    assert card.has_dial and card.has_chat and len(card.kv_bytes) == 3
    assert card.kv_bytes[0] < card.kv_bytes[1] < card.kv_bytes[2]
    assert server.client.get("/v1/models/tiny").json() == card.model_dump()
    assert error_of(server.client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert server.complete(max_tokens=1, model="tiny").status_code == 200
    assert error_of(server.complete(model="other"), 404)["param"] == "model"


def test_tokens_and_back(server: Running) -> None:
    text = "héllo <|endoftext|>"
    tokens = server.client.post("/tokenize", json={"prompt": text}).json()
    assert tokens == {
        "tokens": TOKENIZER(text)["input_ids"],
        "count": len(TOKENIZER(text)["input_ids"]),
        "max_model_len": MAX_LENGTH,
    }
    assert server.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = server.client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert bytes(chat["tokens"]).decode() == "<user>a<assistant>"
    assert error_of(server.client.post("/detokenize", json={"tokens": [999]}), 400)["param"] == "tokens"
    assert error_of(server.client.post("/tokenize", json={}), 400)["message"] == "give either prompt or messages"


def test_health_and_metrics(server: Running) -> None:
    server.complete(max_tokens=7, ignore_eos=True)
    assert server.client.get("/health").json() == {"status": "ready"}
    lines = server.client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["mor_ready"]) == 1
    assert float(values["mor_generated_tokens_total"]) >= 7
    assert float(values['mor_token_depth_bucket{le="3.0"}']) == float(values["mor_generated_tokens_total"])
    assert 1 <= float(values["mor_mean_depth"]) <= 3
    assert float(values["mor_kv_pages_total"]) == 2000
    assert float(values["mor_time_to_first_token_seconds_count"]) >= 1
    assert 'mor_requests_total{path="/v1/completions",status="200"}' in values


def test_the_template_of_these_tests_is_jinja(tmp_path) -> None:
    from mor.serve.chat import read_template

    (tmp_path / "good").write_text(TEMPLATE)
    (tmp_path / "bad").write_text("{% for %}")
    assert read_template(tmp_path / "good") == TEMPLATE
    with pytest.raises(ValueError, match="line 1"):
        read_template(tmp_path / "bad")
