"""Tokens as they are shown."""

from __future__ import annotations

from mor.show.tokens import TokenView, mean_depth, subscript, visible


def test_small_helpers() -> None:
    assert visible("a\n") == "a↵\n"
    assert subscript(12) == "₁₂"
    assert mean_depth([]) == 0
    assert mean_depth([TokenView(text="a", depth=1), TokenView(text="b", depth=2)]) == 1.5
