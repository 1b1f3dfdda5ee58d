"""The official OpenAI client works unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.serving import Running

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").num_recursions == 3


def test_completions_whole_and_streamed(client: Any) -> None:
    asked = dict(model="tiny", prompt="def f", max_tokens=12, seed=1, stop=["\n\n"], logprobs=2)
    whole = client.completions.create(**asked, extra_body={"mean_depth": 1.5})
    assert whole.choices[0].depths and whole.usage.mean_depth >= 1
    with client.completions.create(
        **asked, extra_body={"mean_depth": 1.5}, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chats_whole_and_streamed(client: Any) -> None:
    asked = dict(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=9, seed=2, n=2,
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    whole = client.chat.completions.create(**asked)
    assert len(whole.choices) == 2 and len(whole.choices[0].logprobs.content) == len(whole.choices[0].depths)
    texts = ["", ""]
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == [choice.message.content for choice in whole.choices]


def test_errors_are_the_client_s_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")
