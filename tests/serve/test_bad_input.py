"""What is wrong is refused with the field's name and the limit, never ignored and never a 500."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mor.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.serve.serving import Running, error_of

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "not supported"),
        ({"tools": []}, "tools", "not supported"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "True"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"echo": True, "stream": True}, "echo", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": 201}, "max_tokens", "200"),
        ({"max_tokens": 1.5}, "max_tokens", "integer, not 1.5"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "200"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "at most"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, not -1"),
        ({"temperature": "x" * 99}, "temperature", f'not "{"x" * 49}...'),
        ({"temperature": 1e-9}, "temperature", "0.001"),
        ({"temperature": None, "top_p": 0}, "top_p", "greater than 0"),
        ({"n": 13}, "n", "12"),
        ({"n": 2, "temperature": 0}, "n", "temperature"),
        ({"prompt": ["a", "b", "c", "d"], "n": 4}, "n", "12"),
        ({"seed": -1}, "seed", "greater than or equal"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [7]}, "stop.0", "string"),
        ({"mean_depth": 3.5}, "mean_depth", "3"),
        ({"mean_depth": 0}, "mean_depth", "1"),
        ({"max_recursions": 4}, "max_recursions", "3"),
        ({"max_recursions": 4, "max_tokens": 0, "echo": True}, "max_recursions", "3"),
        ({"n": 2, "temperature": 0, "max_tokens": 0, "echo": True}, "n", "temperature"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "not supported"),
        ({"prompt": "x" * 256}, "prompt", "255"),
        ({"prompt": "x" * 100, "max_tokens": 180}, "max_tokens", "156"),
        ({"prompt": {}}, "prompt", "a valid string or a valid list, not an object"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt.0", "at least 1"),
        ({"prompt": [300]}, "prompt", "300"),
        ({"prompt": [[1], [10**30]], "echo": True}, "prompt", "0..256"),
        ({"prompt": [300], "echo": True, "max_tokens": 0}, "prompt", "300"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "0..256"),
        ({"prompt": [-1]}, "prompt.0", "greater than"),
        ({"prompt": [1, "a"]}, "prompt.1", "should be a valid integer"),
        ({"prompt": ["a", "b", 5]}, "prompt.2", "should be a valid string"),
        ({"prompt": [[1], ["a"]]}, "prompt.1.0", "should be a valid integer"),
        ({"prompt": [None]}, "prompt.0", "a valid integer or a valid string or a valid list"),
    ],
)
def test_a_completion_names_what_is_wrong(server: Running, fields: dict[str, Any], param: str, says: str) -> None:
    error = error_of(server.client.post(PATH, json={"prompt": "abc", **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert error["param"] == param and error["message"].startswith(("the prompt", param.split(".")[0]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"functions": []}, "functions"),
        ({"store": True}, "store"),
    ],
)
def test_a_chat_names_what_is_wrong(server: Running, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    error = error_of(server.client.post("/v1/chat/completions", json=body), 400)
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "a"', "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"\\ud800": 1}', "unicode"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested"),
        (b"[]", "object"),
        (b"", "object"),
    ],
)
def test_bodies_that_are_no_requests(server: Running, body: bytes, says: str) -> None:
    response = server.client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert says in error_of(response, 400)["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {f"x{number}": 0 for number in range(9000)}),
        (CompletionRequest, {"prompt": [[]] * 9000}),
        (CompletionRequest, {"prompt": [{}] * 9000}),
        (CompletionRequest, {"prompt": [[{}]] * 9000}),
        (CompletionRequest, {"prompt": [["a"] * 9000]}),
        (ChatRequest, {"messages": [{}] * 900}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 9000}]}),
        (ChatRequest, {"messages": [], "modalities": [0] * 9000}),
        (TokenizeRequest, {"messages": [{}] * 900}),
        (DetokenizeRequest, {"tokens": [-1] * 9000}),
        (DetokenizeRequest, {"tokens": ["a"] * 9000}),
    ],
)
def test_what_is_wrong_everywhere_is_read_up_to_its_first_mistake(kind: type[BaseModel], body: Any) -> None:
    """A finding for each item of a large body would take gigabytes, and other requests would wait for it."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() < 10


def test_other_types_of_content_are_not_read(server: Running) -> None:
    """So a page of another origin cannot ask without the browser asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = server.client.post(PATH, content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert "application/json" in error_of(response, 400)["message"]


def test_what_is_not_there(server: Running) -> None:
    assert error_of(server.client.get("/nothing"), 404)["code"] == "not_found"
    refused = server.client.get(PATH)
    assert error_of(refused, 405)["code"] == "method_not_allowed" and refused.headers["allow"] == "POST"
    assert server.client.get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_what_is_not_served_has_a_code_of_its_own(server: Running) -> None:
    for fields in ({"logit_bias": {"5": 1}}, {"tools": [{"type": "function"}]}, {"functions": []}):
        error = error_of(server.chat("x", **fields), 400)
        assert error["code"] == "unsupported_parameter" and [error["param"]] == list(fields)


def test_fields_of_openai_s_that_say_the_default_are_taken(server: Running) -> None:
    nothing = dict.fromkeys("stop seed n logprobs echo suffix best_of logit_bias stream_options user top_p".split())
    assert server.complete(max_tokens=1, **nothing).status_code == 200
    assert server.complete(max_tokens=1, best_of=1, logit_bias={}, n=1.0, user="me", top_k=-1).status_code == 200
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert server.chat("x", max_tokens=1, **fields).status_code == 200


def test_more_than_all_tokens_is_all(server: Running) -> None:
    """Beside others: a number that no row can hold would fail the visit, and all that take part in it."""
    assert server.complete(max_tokens=2, top_k=10**30).status_code == 200


def test_a_page_whose_name_leads_here_by_a_trick_is_turned_away(server: Running) -> None:
    """DNS rebinding: to the browser it is one origin with the server, so nothing else holds it back."""
    headers = {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}
    body = {"prompt": "abc", "max_tokens": 1}
    assert error_of(server.client.post(PATH, json=body, headers=headers), 403)["code"] == "origin_not_allowed"
    headers = {"Origin": f"http://localhost:{server.server.port}"}
    assert server.client.post(PATH, json=body, headers=headers).status_code == 200
