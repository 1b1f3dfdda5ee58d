"""The validation split depends on the text alone, and no split is left empty while there are two texts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data.split import HashSplit, make_document

TEXTS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=30)


def deal(texts: list[str], fraction: float) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for split, document in HashSplit(fraction).deal(map(make_document, texts)):
        splits[split].append(document.text)
    return splits


def test_the_share_is_about_what_was_asked_for():
    splits = deal([f"document {i}" for i in range(5000)], 0.1)
    assert 400 < len(splits["validation"]) < 600


def test_a_document_keeps_its_split_when_others_come():
    few, many = deal([f"document {i}" for i in range(500)], 0.1), deal([f"document {i}" for i in range(5000)], 0.1)
    assert set(few["validation"]) <= set(many["validation"])
    assert set(few["train"]) <= set(many["train"])


@given(texts=TEXTS, fraction=st.sampled_from([0.01, 0.5, 0.99]))
def test_nothing_is_lost_and_nothing_is_empty(texts: list[str], fraction: float):
    if len(set(texts)) == 1:
        with pytest.raises(ValueError, match="needs two distinct documents"):
            deal(texts, fraction)
        return
    splits = deal(texts, fraction)
    assert Counter(splits["train"] + splits["validation"]) == Counter(texts)
    assert not set(splits["train"]) & set(splits["validation"])
    if texts:
        assert splits["train"]
        assert splits["validation"]


@given(texts=TEXTS, seed=st.randoms(use_true_random=False), fraction=st.sampled_from([0.01, 0.5, 0.99]))
def test_the_order_of_documents_does_not_matter(texts: list[str], seed, fraction: float):
    if len(set(texts)) == 1:
        return
    shuffled = list(texts)
    seed.shuffle(shuffled)
    assert {k: Counter(v) for k, v in deal(texts, fraction).items()} == {
        k: Counter(v) for k, v in deal(shuffled, fraction).items()
    }


def test_at_most_one_document_is_held_back():
    documents = [make_document(f"document {i}") for i in range(100)]
    taken: list[int] = []
    for given_out, _ in enumerate(HashSplit(1e-9).deal(taken.append(i) or d for i, d in enumerate(documents))):
        assert len(taken) <= given_out + 2


def test_no_validation_split():
    assert deal(["only"], 0) == {"train": ["only"], "validation": []}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_a_fraction_out_of_range(fraction: float):
    with pytest.raises(ValueError, match=r"validation_fraction=.* must be at least 0 and below 1"):
        HashSplit(fraction)


def test_text_that_is_not_unicode_is_named():
    with pytest.raises(ValueError, match=r"document that begins 'ab.ud800' is not valid Unicode"):
        make_document("ab\ud800")
