"""Servers that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra mor[serve]")

from tests.serve.serving import Running, running


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    """A server of a tiny model that nothing is done to but asking."""
    with running(max_tokens=200, max_choices=12) as server:
        yield server
