"""Options that cannot work are refused by name and value."""

from __future__ import annotations

from typing import Any

import pytest

from mor.engine.options import EngineOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(page_entries=0), "page_entries=0 must be a whole number of at least 1"),
        (dict(num_pages=0), "num_pages=0 must be a whole number of at least 1"),
        (dict(max_requests=-1), "max_requests=-1 must be a whole number of at least 1"),
        (dict(max_visit_tokens=0), "max_visit_tokens=0 must be a whole number of at least 1"),
        (dict(prefill_chunk=0), "prefill_chunk=0 must be a whole number of at least 1"),
        (dict(max_length=1), "max_length=1 must be a whole number of at least 2"),
        (dict(page_entries=1.5), "page_entries=1.5 must be a whole number of at least 1"),
        (dict(page_entries=None), "page_entries=None must be a whole number"),
        (dict(num_pages=float("nan")), "num_pages=nan must be a whole number"),
        (dict(max_requests="8"), "max_requests='8' must be a whole number"),
        (dict(max_visit_tokens=True), "max_visit_tokens=True must be a whole number"),
        (dict(tokens_to_grow=-1), "tokens_to_grow=-1 must be a whole number of at least 0"),
        (dict(kv_memory_gib=float("inf")), "kv_memory_gib=inf must be positive and finite"),
        (dict(kv_memory_gib=0.0), "kv_memory_gib=0.0 must be positive"),
        (dict(kv_memory_gib=float("nan")), "kv_memory_gib=nan must be positive"),
        (dict(memory_share=0.0), r"memory_share=0.0 must lie in \(0, 1\]"),
        (dict(memory_share=1.1), r"memory_share=1.1 must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


def test_the_least_of_everything() -> None:
    options = EngineOptions(
        page_entries=1, num_pages=1, max_requests=1, max_visit_tokens=1, prefill_chunk=1, max_length=2, memory_share=1.0
    )
    assert options.max_length == 2 and EngineOptions().num_pages is None
