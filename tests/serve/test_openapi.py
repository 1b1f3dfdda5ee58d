"""The server's own description is true: what it allows gets a described answer, and nothing gets a 500."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.serving import Running

schemathesis = pytest.importorskip("schemathesis")

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GETS = ("/v1/models/{name}", "/v1/models", "/health")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("path", POSTS)
def test_no_post_finds_a_500(server: Running, path: str, wrong: bool) -> None:
    mode = schemathesis.GenerationMode
    ask_all(server, path, "POST", mode.NEGATIVE if wrong else mode.POSITIVE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", GETS)
def test_no_get_finds_a_500(server: Running, path: str) -> None:
    ask_all(server, path, "GET", schemathesis.GenerationMode.POSITIVE)


def ask_all(server: Running, path: str, method: str, mode: Any) -> None:
    """Requests of one kind, each checked against the description."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
    )
    def ask(case: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.validate_response(case.call(timeout=60), checks=checks)

    ask()
