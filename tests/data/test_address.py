"""Options and weights are told from the names of sources."""

import pytest

from mor.data.address import split_options, split_weight


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("folder", ("folder", None)),
        ("folder=0.5", ("folder", 0.5)),
        ("a=b/c.txt", ("a=b/c.txt", None)),
        ("a=b=2", ("a=b", 2.0)),
        ("hf://a/b?split=train", ("hf://a/b?split=train", None)),
        ("hf://a/b?split=train=0.3", ("hf://a/b?split=train", 0.3)),
        ("hf://a/b?revision=12", ("hf://a/b?revision=12", None)),
        ("hf://a/b:c?split=x&column=7", ("hf://a/b:c?split=x&column=7", None)),
        ("hf://a/b:c?split=x&column=7=1e-1", ("hf://a/b:c?split=x&column=7", 0.1)),
    ],
)
def test_weights(word: str, expected: tuple[str, float | None]):
    assert split_weight(word) == expected


@pytest.mark.parametrize("word", ["a=0", "a=-2", "a=nan", "a=inf"])
def test_weights_that_are_none(word: str):
    with pytest.raises(ValueError, match="must be a positive number"):
        split_weight(word)


def test_options():
    assert split_options("a/b", ("split",)) == ("a/b", {})
    assert split_options("a?split=train%5B%3A5%5D&column=b", ("split", "column")) == (
        "a",
        {"split": "train[:5]", "column": "b"},
    )


@pytest.mark.parametrize("query", ["splt=train", "split", "split=", "split=a&split=b", "=a", "&"])
def test_bad_options(query: str):
    with pytest.raises(ValueError, match=r"bad option .*; after '\?' there may be split=\.\.\., column=\.\.\."):
        split_options(f"a?{query}", ("split", "column"))
