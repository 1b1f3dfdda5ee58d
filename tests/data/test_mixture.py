"""Mixed sources keep their proportions at every place, and end with the first that ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from mor.data.mixture import Mixture
from mor.data.sources import open_mixture
from mor.data.stream import CountedStream, DocumentStream, GivenDocuments, Position


class Repeated:
    """`count` documents of `length` characters, all the same."""

    def __init__(self, text: str, length: int, count: int) -> None:
        self.text, self.length, self.count = text, length, count

    def describe(self) -> dict[str, Any]:
        return {"text": self.text}

    def documents(self, position: Position | None = None) -> DocumentStream:
        return CountedStream((self.text * self.length for _ in range(self.count)), position)


def test_bytes_stand_as_the_weights_everywhere():
    mixture = Mixture([Repeated("a", 10, 1000), Repeated("é", 35, 1000), Repeated("c", 100, 1000)], [2, 7, 1])
    counts = dict.fromkeys("aéc", 0)
    for number, text in enumerate(mixture.documents()):
        counts[text[0]] += len(text.encode())
        total = sum(counts.values())
        if number > 200:
            assert [counts[c] / total for c in "aéc"] == pytest.approx([0.2, 0.7, 0.1], abs=0.05)
    assert counts["a"] == 10_000 or counts["é"] == 70_000


def test_a_mixture_ends_with_its_first_source():
    mixture = Mixture([Repeated("a", 1, 5), Repeated("b", 1, 100)], [0.5, 0.5])
    assert list(mixture.documents()) == ["a", "b"] * 5


def test_every_place_can_be_entered_again():
    mixture = Mixture([Repeated("a", 3, 9), Repeated("b", 2, 30)], [0.4, 0.6])
    expected = list(mixture.documents())
    stream = mixture.documents()
    for given in range(len(expected)):
        position = json.loads(json.dumps(stream.position()))
        assert list(mixture.documents(position)) == expected[given:]
        next(stream)


def test_unknown_documents_cannot_be_entered_again():
    mixture = Mixture([GivenDocuments(["a"], None), Repeated("b", 2, 30)], [1, 1])  # type: ignore[list-item]
    assert mixture.documents().position() is None


def test_sources_are_given_with_weights(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    a, b = (str(tmp_path / f"{name}.txt") for name in "ab")
    mixed = open_mixture([f"{a}=0.7", f"{b}=2.1"])
    assert isinstance(mixed, Mixture)
    assert mixed.weights == pytest.approx((0.25, 0.75))
    assert [part["weight"] for part in mixed.describe()["parts"]] == list(mixed.weights)
    assert list(mixed.documents()) == ["a", "b"]
    assert list(open_mixture([f"{a}=3"]).documents()) == ["a"]
    assert mixed.documents().share() == 0
    with pytest.raises(ValueError, match=r"b\.txt has no weight; to mix sources give each one"):
        open_mixture([f"{a}=0.7", b])
    with pytest.raises(ValueError, match="the weight -1 must be a positive number"):
        open_mixture([f"{a}=-1", f"{b}=1"])
    with pytest.raises(ValueError, match=r"weights=\[0\] must be positive"):
        Mixture([Repeated("a", 1, 1)], [0])
