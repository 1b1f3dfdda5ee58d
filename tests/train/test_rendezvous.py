from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from mor.train import rendezvous
from mor.train.rendezvous import agent_store, agree_on_life


def meet(store, size):
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda rank: agree_on_life(store, rank, size), reversed(range(size))))


def test_every_life_has_a_number_of_its_own():
    store = HashStore()
    assert [meet(store, size) for size in (3, 2, 3)] == [{1}, {2}, {3}]


def test_a_question_left_by_a_dead_process_is_not_taken_for_an_answer():
    store = HashStore()
    store.set("mor/question/1", "left")
    store.set("mor/lives", "4")
    assert meet(store, 2) == {5}


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS", 0.1)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come"):
        agree_on_life(HashStore(), 0, 2)


def test_without_torchruns_store_there_is_nothing_to_agree_on(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_store(0, 2) is None
