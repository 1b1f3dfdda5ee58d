"""An epoch gives every row once, whatever the batch, and a loader continues exactly where its state was taken."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.data.loader import Batch, PackedLoader, evaluation_batches
from mor.data.shards import TokenShards, write_shards
from mor.data.tokenizer import byte_tokenizer
from tests.data.conftest import MakeShards

END = 256
CORPUS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def documents_of(lengths: Sequence[int]) -> list[str]:
    return [chr(33 + i) * length for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[int]], TokenShards]:
    """Shards of documents of the given lengths, made once for each."""
    corpora: dict[tuple[int, ...], TokenShards] = {}

    def make(lengths: Sequence[int]) -> TokenShards:
        key = tuple(lengths)
        if key not in corpora:
            folder = tmp_path_factory.mktemp("corpus") / "shards"
            write_shards(documents_of(lengths), byte_tokenizer(), folder, validation_fraction=0, shard_tokens=50)
            corpora[key] = TokenShards(folder, "train")
        return corpora[key]

    return make


def rows(loader: PackedLoader, num_batches: int) -> list[list[int]]:
    return [row for _, batch in zip(range(num_batches), loader) for row in batch.input_ids.tolist()]


def ring_rows(shards: TokenShards, first: int, sequence_length: int) -> list[tuple[int, ...]]:
    """The rows of an epoch that begins at token `first`, in the order of the split."""
    tokens, num_rows = shards.read(0, shards.num_tokens).tolist(), max(1, shards.num_tokens // sequence_length)
    return [
        tuple(tokens[(first + row * sequence_length + i) % len(tokens)] for i in range(sequence_length))
        for row in range(num_rows)
    ]


@given(lengths=CORPUS, sequence_length=st.integers(1, 60), batch_size=st.integers(1, 3), seed=st.integers(0, 5))
def test_an_epoch_gives_every_row_once(shards_of, lengths, sequence_length: int, batch_size: int, seed: int):
    """From some place of the ring on; so no token comes twice, and those that are left out are less than a row."""
    shards = shards_of(lengths)
    epochs, num_rows = 3, max(1, shards.num_tokens // sequence_length)
    loader = PackedLoader(shards, batch_size=batch_size, sequence_length=sequence_length, seed=seed)
    stream = [tuple(row) for row in rows(loader, -(-epochs * num_rows // batch_size))]
    possible = [Counter(ring_rows(shards, first, sequence_length)) for first in range(shards.num_tokens)]
    for epoch in range(epochs):
        assert Counter(stream[epoch * num_rows : (epoch + 1) * num_rows]) in possible


@pytest.mark.parametrize("texts", [documents_of([9] * 60), ["".join(chr(33 + i) * 10 for i in range(60))]])
def test_a_batch_has_rows_from_anywhere(texts: list[str], make_shards: MakeShards):
    """Of a split that is many short documents, as of one that is a long one."""
    loader = PackedLoader(make_shards(texts), batch_size=30, sequence_length=10, seed=0)
    places = [row[0] if row[0] != END else row[1] - 1 for row in rows(loader, 1)]
    assert len(set(places)) >= 29
    assert sum(abs(a - b) <= 1 for a, b in pairwise(places)) <= 3


@given(lengths=CORPUS, sequence_length=st.integers(1, 60), before=st.integers(0, 9), data=st.data())
def test_a_state_continues_the_stream(shards_of, lengths, sequence_length: int, before: int, data):
    shards = shards_of(lengths)
    options: dict[str, Any] = {"sequence_length": sequence_length, "seed": 1, "document_ids": True}
    whole = PackedLoader(shards, batch_size=2, **options)
    for _ in range(before):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PackedLoader(shards, batch_size=2, **options)
    for _ in range(data.draw(st.integers(0, 3))):
        next(resumed)
    resumed.load_state_dict(state)
    for _ in range(4):
        assert_equal(next(whole), next(resumed))
        assert whole.state_dict() == resumed.state_dict()


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.epoch == b.epoch
    assert torch.equal(a.input_ids, b.input_ids)
    assert a.document_ids is not None
    assert b.document_ids is not None
    assert torch.equal(a.document_ids, b.document_ids)


@given(lengths=CORPUS, world_size=st.integers(1, 4), sequence_length=st.integers(1, 30))
def test_ranks_share_one_stream(shards_of, lengths, world_size: int, sequence_length: int):
    shards = shards_of(lengths)
    options: dict[str, Any] = {"sequence_length": sequence_length, "seed": 3}
    alone = PackedLoader(shards, batch_size=2 * world_size, **options)
    ranks = [
        PackedLoader(shards, batch_size=2, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for _ in range(3):
        parts = [next(rank).input_ids for rank in ranks]
        assert torch.equal(next(alone).input_ids, torch.cat(parts))
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_batches_have_the_promised_form(make_shards: MakeShards):
    loader = PackedLoader(make_shards(["abc", "defgh"]), batch_size=2, sequence_length=5, seed=0)
    batch = next(loader)
    assert (batch.input_ids.shape, batch.input_ids.dtype, batch.document_ids) == ((2, 5), torch.int64, None)
    assert batch.epoch == 0
    assert next(loader).epoch == 1
    assert iter(loader) is loader


def test_document_ids_follow_the_documents(make_shards: MakeShards):
    shards = make_shards(documents_of([3, 9, 1, 5]))
    loader = PackedLoader(shards, batch_size=3, sequence_length=8, seed=0, document_ids=True)
    for _ in range(5):
        batch = next(loader)
        assert batch.document_ids is not None
        for ids, documents in zip(batch.input_ids.tolist(), batch.document_ids.tolist()):
            starts = [0, *(token == END for token in ids[:-1])]
            assert documents == torch.tensor(starts).cumsum(0).tolist()


def test_every_epoch_has_its_own_order(make_shards: MakeShards):
    shards = make_shards(documents_of([7] * 40))
    first, other = (PackedLoader(shards, batch_size=40, sequence_length=8, seed=seed) for seed in (0, 1))
    orders = [tuple(map(tuple, rows(loader, 1))) for loader in (first, other) for _ in range(5)]
    assert len(set(orders)) == 10
    assert len({frozenset(order) for order in orders}) > 5, "rows are cut at other places, too"


def test_a_state_of_something_else_is_refused(make_shards: MakeShards):
    shards = make_shards(documents_of([3, 9]))
    loader = PackedLoader(shards, batch_size=1, sequence_length=4, seed=0)
    state = loader.state_dict()
    other_data = PackedLoader(make_shards(["other", "text"]), batch_size=1, sequence_length=4, seed=0)
    with pytest.raises(ValueError, match="belongs to other token shards"):
        other_data.load_state_dict(state)
    other_seed = PackedLoader(shards, batch_size=1, sequence_length=4, seed=7)
    with pytest.raises(ValueError, match="belongs to seed=0, not seed=7"):
        other_seed.load_state_dict(state)
    with pytest.raises(ValueError, match="row=3 among 3 rows of an epoch"):
        loader.load_state_dict({**state, "row": 3})
    other_length = PackedLoader(shards, batch_size=1, sequence_length=5, seed=0)
    with pytest.raises(ValueError, match="belongs to sequence_length=4, not sequence_length=5"):
        other_length.load_state_dict(state)
    with pytest.raises(ValueError, match=r"loader state has keys \['epoch'\]"):
        loader.load_state_dict({"epoch": 1})


@pytest.mark.parametrize("name", ["batch_size", "sequence_length", "world_size", "rank"])
def test_options_out_of_range(name: str, make_shards: MakeShards):
    options = {"batch_size": 1, "sequence_length": 4, "seed": 0, name: -1}
    with pytest.raises(ValueError, match=f"{name}=-1 must"):
        PackedLoader(make_shards(["a"]), **options)


def test_a_damaged_shard_stops_the_loader(make_shards: MakeShards):
    shards = make_shards(["abc"])
    (shards.folder / "train-00000.bin").write_bytes(b"\xff" * 8)
    with pytest.raises(ValueError, match="is outside the vocabulary"):
        next(PackedLoader(TokenShards(shards.folder, "train"), batch_size=1, sequence_length=4, seed=0))


@given(lengths=CORPUS, sequence_length=st.integers(1, 30), batch_size=st.integers(1, 5))
def test_evaluation_reads_the_split_in_order(shards_of, lengths, sequence_length: int, batch_size: int):
    shards = shards_of(lengths)
    num_rows = shards.num_tokens // sequence_length
    if not num_rows:
        return
    batches = list(evaluation_batches(shards, batch_size=batch_size, sequence_length=sequence_length))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    tokens = torch.cat(batches).flatten()
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == shards.read(0, num_rows * sequence_length).tolist()


def test_a_small_evaluation_is_a_sample_of_the_whole(make_shards: MakeShards):
    shards = make_shards(documents_of([9] * 10))
    batches = list(evaluation_batches(shards, batch_size=2, sequence_length=10, max_tokens=39))
    assert [batch.shape for batch in batches] == [(2, 10), (1, 10)]
    assert torch.cat(batches)[:, 0].tolist() == [33 + 0, 33 + 3, 33 + 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 11}, r"split 'train' of .* has 10 tokens, too few for one row of sequence_length=11"),
        ({"sequence_length": 5, "max_tokens": 4}, "max_tokens=4 is too small for one row of sequence_length=5"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
    ],
)
def test_an_evaluation_that_gives_nothing_is_an_error(options: dict[str, int], message: str, make_shards: MakeShards):
    with pytest.raises(ValueError, match=message):
        evaluation_batches(make_shards(["123456789"]), batch_size=1, **options)
