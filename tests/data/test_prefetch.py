"""Batches made ahead are the loader's own, and its state is that of the last batch handed out."""

import gc
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.data.loader import Batch, PackedLoader
from mor.data.prefetch import PrefetchLoader
from mor.data.shards import TokenShards
from tests.data.conftest import MakeShards

TEXTS = [chr(33 + i) * (1 + 7 * i % 23) for i in range(40)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    from mor.data.shards import write_shards
    from mor.data.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("prefetch") / "shards"
    write_shards(TEXTS, byte_tokenizer(), folder, validation_fraction=0)
    return TokenShards(folder, "train")


def make(shards: TokenShards, *, batch_size: int = 2, **options: Any) -> PackedLoader:
    return PackedLoader(shards, batch_size=batch_size, sequence_length=16, seed=1, document_ids=True, **options)


def take(loader: Any, count: int) -> list[Batch]:
    return [batch for _, batch in zip(range(count), loader)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.epoch == b.epoch
        assert torch.equal(a.input_ids, b.input_ids)
        assert a.document_ids is not None
        assert b.document_ids is not None
        assert torch.equal(a.document_ids, b.document_ids)


@given(before=st.integers(0, 12), after=st.integers(0, 12), depth=st.integers(1, 4))
def test_states_do_not_run_ahead(shards: TokenShards, before: int, after: int, depth: int):
    plain, ahead = make(shards), PrefetchLoader(make(shards), depth=depth)
    assert ahead.state_dict() == plain.state_dict()
    assert_same(take(ahead, before), take(plain, before))
    state = json.loads(json.dumps(ahead.state_dict()))
    assert state == plain.state_dict()
    take(ahead, after)
    ahead.load_state_dict(state)
    assert ahead.state_dict() == state
    assert_same(take(ahead, 3), take(plain, 3))
    ahead.close()


def _stream(shards: TokenShards, sizes: list[int], steps: list[int], rows: int) -> torch.Tensor:
    """The rows that runs on `sizes` ranks one after the other read, each going on where the one before stopped."""
    state: dict[str, int] | None = None
    read: list[torch.Tensor] = []
    for size, count in zip(sizes, steps):
        ranks = [PrefetchLoader(make(shards, batch_size=rows // size, rank=r, world_size=size)) for r in range(size)]
        if state is not None:
            for rank in ranks:
                rank.load_state_dict(state)
        for _ in range(count):
            read += [next(rank).input_ids for rank in ranks]
            state = ranks[0].state_dict()
            assert all(rank.state_dict() == state for rank in ranks)
        for rank in ranks:
            rank.close()
    return torch.cat(read)


@given(sizes=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=4), count=st.integers(1, 5), data=st.data())
def test_the_stream_is_the_same_for_every_number_of_ranks(shards: TokenShards, sizes: list[int], count: int, data):
    steps = [data.draw(st.integers(1, count)) for _ in sizes]
    found = _stream(shards, sizes, steps, rows=6)
    expected = torch.cat([batch.input_ids for batch in take(make(shards, batch_size=6), sum(steps))])
    assert torch.equal(found, expected)


def test_batches_are_made_ahead(shards: TokenShards):
    made = threading.Semaphore(0)

    class Watched(PackedLoader):
        def __next__(self) -> Batch:
            batch = super().__next__()
            made.release()
            return batch

    loader = PrefetchLoader(Watched(shards, batch_size=1, sequence_length=8, seed=0), depth=2)
    assert not made.acquire(timeout=0.05)  # the thread starts with the first batch
    next(loader)
    for _ in range(3):  # the one handed out, and two more while nobody asks
        assert made.acquire(timeout=5)
    loader.close()


def test_errors_reach_the_one_who_asks(make_shards: MakeShards):
    shards = make_shards(["abc"])
    (shards.folder / "train-00000.bin").write_bytes(b"\xff" * 8)
    damaged = TokenShards(shards.folder, "train")
    loader = PrefetchLoader(PackedLoader(damaged, batch_size=1, sequence_length=4, seed=0))
    for _ in range(2):
        with pytest.raises(ValueError, match="is outside the vocabulary"):
            next(loader)


def test_a_state_of_something_else_is_refused(shards: TokenShards, make_shards: MakeShards):
    loader = PrefetchLoader(make(shards))
    state = loader.state_dict()
    expected = take(make(shards), 3)
    assert_same(take(loader, 1), expected[:1])
    with pytest.raises(ValueError, match="belongs to seed=9"):
        loader.load_state_dict({**state, "seed": 9})
    assert_same(take(loader, 2), expected[1:])
    loader.close()


def test_a_forgotten_loader_leaves_no_thread(shards: TokenShards):
    before = threading.active_count()
    loader = PrefetchLoader(make(shards))
    next(loader)
    assert threading.active_count() == before + 1
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_depth_out_of_range(shards: TokenShards):
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        PrefetchLoader(make(shards), depth=0)


MEASURE = """
import sys
from mor.data.loader import PackedLoader
from mor.data.prefetch import PrefetchLoader
from mor.data.shards import TokenShards

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

shards = TokenShards(sys.argv[1], "train")
loader = PrefetchLoader(PackedLoader(shards, batch_size=2, sequence_length=16, seed=1, document_ids=True))
for step in range(13_000):
    next(loader)
    if step == 3_000:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_ten_thousand_steps(shards: TokenShards):
    """In a process of its own: in this one, what other tests left behind moves the allocator."""
    words = [sys.executable, "-c", MEASURE, str(shards.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) < 1_000_000


def test_nothing_is_kept_of_batches_handed_out(shards: TokenShards):
    loader = PrefetchLoader(make(shards))
    tracemalloc.start(1)
    take(loader, 200)
    traced = tracemalloc.get_traced_memory()[0]
    take(loader, 600)
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    loader.close()
    assert grown < 20_000
