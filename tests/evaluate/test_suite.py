"""Tasks made from text: what the items are, and that a model that knows the text does well."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mor.data.tokenizer import byte_tokenizer
from mor.evaluate.backends import Pair
from mor.evaluate.suite import TASKS, Item, build_items, score_items

SUBJECTS = ("The garden", "The keepers", "A river", "Many people")
ENDINGS = ("water", "stone", "light", "bread", "storm", "house", "paper", "glass")
TOWNS = "old new far near high low cold warm dry wet grey green red".split()
DOCUMENTS = [
    " ".join(
        f"{SUBJECTS[(n + k) % 4]} of the {town} town {'are' if (n + k) % 2 else 'is'} known to all for "
        f"the {ENDINGS[(n + 3 * k) % 8]}."
        for k in range(4)
    )
    for n, town in enumerate(TOWNS)
]


@pytest.mark.parametrize("task", TASKS)
def test_items_hold_the_right_choice_once_and_come_from_the_text(task: str) -> None:
    items = build_items(task, DOCUMENTS)
    flat = " ".join(DOCUMENTS)
    assert len(items) >= 39
    for item in items:
        assert len(set(item.choices)) == len(item.choices) == (2 if task == "agreement" else 4)
        assert item.context + item.choices[item.answer] in flat
    assert len({item.answer for item in items}) == len(items[0].choices), "the right place would give the answer away"


def test_items_depend_on_text_and_seed_alone() -> None:
    for task in TASKS:
        assert build_items(task, DOCUMENTS, limit=9) == build_items(task, DOCUMENTS, limit=9)
        assert build_items(task, DOCUMENTS, limit=9) != build_items(task, DOCUMENTS, limit=9, seed=1)


def test_wrong_sentences_come_from_other_documents() -> None:
    for item in build_items("next_sentence", DOCUMENTS):
        home = next(d for d in DOCUMENTS if item.context + item.choices[item.answer] in d)
        assert item.context in home


def test_agreement_offers_the_other_number() -> None:
    (item,) = build_items("agreement", ["The dogs of the man were in the yard."])
    assert item.context == "The dogs of the man"
    assert sorted(item.choices) == [" was", " were"]
    assert item.choices[item.answer] == " were"


class Oracle:
    """Prefers continuations by a rule."""

    max_length = 1000

    def __init__(self, knows: Sequence[str] = (), *, longest: bool = False) -> None:
        self._text, self._longest = " ".join(knows), longest

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        found = []
        for context, continuation in pairs:
            text = bytes([*context, *continuation]).decode()
            log = -1.0 if text in self._text else -50.0
            found.append((-1.0 * len(continuation) ** 0.5 if self._longest else log, False))
        return found

    def write(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        raise NotImplementedError


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_the_text_is_right(task: str) -> None:
    score = score_items(task, build_items(task, DOCUMENTS), Oracle(DOCUMENTS), byte_tokenizer())
    assert score.accuracy == 1
    assert score.chance == (0.5 if task == "agreement" else 0.25)
    assert score.accuracy_error == 0


def test_scores_by_hand() -> None:
    """Log-probabilities -sqrt(n): the shortest wins, but per byte the longest does."""
    items = [Item(context="x", choices=("a", "bcde"), answer=n) for n in (0, 0, 0, 1)]
    score = score_items("by hand", items, Oracle(longest=True), byte_tokenizer())
    assert (score.items, score.accuracy, score.accuracy_by_bytes) == (4, 0.75, 0.25)
    assert score.accuracy_error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_what_cannot_be_built_is_an_error() -> None:
    with pytest.raises(ValueError, match="'sums' is not built in; choose from cloze"):
        build_items("sums", DOCUMENTS)
    with pytest.raises(ValueError, match="no suitable sentences"):
        build_items("cloze", ["def f(x): return x"])
