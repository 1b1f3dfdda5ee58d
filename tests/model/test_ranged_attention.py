import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mor.model import ranged_attention
from mor.model.ranged_attention import BLOCK, KeyRange, attend_blocks, document_starts, visible_blocks
from mor.model.token_set import TokenSet
from tests.tiny import random_ids, tiny_model


def random_documents(size, length, batch=2, seed=0):
    """(B, T) document numbers, documents of `length` tokens on average."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, size, generator=generator) < 1 / length).cumsum(1)


KINDS = ("own", "all", "earlier")


def keys_of(documents, share, *, kind, seed=0):
    """What a random `share` of the tokens sees: of one another in a document, of all in it, or of all there are. One
    row has fewer: it has absent places."""
    generator = torch.Generator().manual_seed(seed)
    member = torch.rand(documents.shape, generator=generator) < share
    member[:, 0], member[0, 1:7] = True, False
    active, starts = TokenSet.from_mask(member), document_starts(documents)
    first = active.gather(starts)
    if kind == "own":
        size = first.shape[1]
        return KeyRange(document_starts(first), torch.arange(size).expand_as(first), size), active
    return KeyRange(None if kind == "earlier" else first, active.index_BK, documents.shape[1]), active


def test_a_document_starts_where_the_number_changes():
    documents = torch.tensor([[4, 4, 4, 1, 1, 4], [0, 1, 1, 1, 2, 2]])
    assert document_starts(documents).tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 4, 4]]
    assert document_starts(documents[:, :1]).tolist() == [[0], [0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_real_queries_see_the_earlier_real_keys_of_their_document(kind, share):
    documents = random_documents(60, 9)
    keys, active = keys_of(documents, share, kind=kind)
    if kind == "earlier":
        documents = torch.zeros_like(documents)
    assert bool(keys.mask_BKL.any(2).all()), "an absent query that sees nothing would have no softmax"
    for row in range(2):
        places = active.index_BK[row][active.valid_BK[row]].tolist()
        reachable = places if kind == "own" else list(range(60))
        for query, place in enumerate(places):
            seen = [reachable[key] for key in keys.mask_BKL[row, query].nonzero().squeeze(1).tolist()]
            assert seen == [k for k in reachable if k <= place and documents[row, k] == documents[row, place]]


def blocks_of(keys):
    """What `keys.blocks` would be, not compiled."""
    first, last = keys.bounds
    return visible_blocks(torch.zeros_like(last) if first is None else first, last, keys.num_keys)


@given(
    size=st.integers(1, 700),
    length=st.sampled_from([3, 50, 200, 2000]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_blocks_say_exactly_what_is_seen(size, length, kind, seed):
    """Whole blocks are seen whole, partial ones need the mask, all others hold nothing; from the queries' side and
    from the keys'."""
    keys, _ = keys_of(random_documents(max(size, 8), length, seed=seed), 0.6, kind=kind, seed=seed)
    seen = keys.mask_BKL
    blocks = blocks_of(keys)
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[2] % BLOCK, 0, -seen.shape[1] % BLOCK))
    tiles = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
    real = torch.nn.functional.pad(torch.ones_like(seen), (0, -seen.shape[2] % BLOCK, 0, -seen.shape[1] % BLOCK))
    real_tiles = real.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
    for first, flip in ((0, False), (4, True)):
        part, whole = (listed(*blocks[i : i + 2], flip=flip, shape=tiles.shape[1:3]) for i in (first, first + 2))
        assert not (part & whole).any()
        assert not tiles[~(part | whole)].any()
        assert (tiles | ~real_tiles)[whole].all()


def listed(counts, indices, *, flip, shape):
    """(B, Q, N) true at the listed blocks; `flip` when query blocks are listed by key block."""
    rows = torch.zeros(counts.shape[0], *(reversed(shape) if flip else shape), dtype=torch.bool)
    for row, block in torch.cartesian_prod(torch.arange(rows.shape[0]), torch.arange(rows.shape[1])).tolist():
        chosen = indices[row, 0, block, : counts[row, 0, block]].long()
        assert len(set(chosen.tolist())) == len(chosen)
        rows[row, block, chosen] = True
    return rows.transpose(1, 2) if flip else rows


def test_far_documents_are_skipped():
    """Documents of one block each: every block of queries looks at one block of keys."""
    documents = torch.arange(8).repeat_interleave(BLOCK)[None]
    place = torch.arange(8 * BLOCK)[None]
    counts, indices, whole, *_ = visible_blocks(document_starts(documents), place, 8 * BLOCK)
    assert counts.flatten().tolist() == [1] * 8 and whole.flatten().tolist() == [0] * 8
    assert indices[0, 0, :, 0].tolist() == list(range(8))


def random_inputs(keys, size=16, **settings):
    """Queries, keys and values that fit."""
    shapes = (4, keys.last_BK.shape[1]), (2, keys.num_keys), (2, keys.num_keys)
    return [torch.randn(2, heads, count, size, **settings) for heads, count in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "length"), [(200, 30), (400, 500)])
def test_the_block_sparse_twin_equals_the_masked_attention(size, length, kind):
    keys, _ = keys_of(random_documents(size, length), 0.7, kind=kind)
    inputs = random_inputs(keys)
    blocks = blocks_of(keys)
    sparse = attend_blocks(*inputs, keys.first_BK, keys.last_BK, blocks)
    torch.testing.assert_close(sparse, keys.attend(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_sizes_is_compiled_a_few_times(kind, monkeypatch):
    """Token-choice and warm-ups change the number of queries in each step, and inside documents that of keys."""
    counters = {name: CompileCounterWithBackend("eager") for name in ("visible_blocks", "attend_blocks")}
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counters[f.__name__], **options))
    monkeypatch.setattr(ranged_attention, "_compiled", functools.cache(ranged_attention._compiled.__wrapped__))
    torch._dynamo.reset()
    for size in (300, 350, 333, 256, 400, 512, 600, 200, 450, 501, 384, 210):
        keys, _ = keys_of(random_documents(size, 90), 0.7, kind=kind)
        ranged_attention._compiled(attend_blocks)(*random_inputs(keys), *keys.bounds, keys.blocks)
    assert counters["visible_blocks"].frame_count == 1
    assert counters["attend_blocks"].frame_count <= 4  # sizes of the first call, any, few blocks


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])  # the first: in tf32
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_twin_equals_the_masked_attention_with_gradients(kind, dtype, tolerance):
    """For sizes that change from call to call."""
    for size in (1000, 700, 900, 333, 600, 512, 1024, 450, 777, 850, 555):
        keys, _ = keys_of(random_documents(size, 90), 0.7, kind=kind)
        first = None if keys.first_BK is None else keys.first_BK.cuda()
        keys = KeyRange(first, keys.last_BK.cuda(), keys.num_keys)
        inputs = [t.to(dtype).float().requires_grad_() for t in random_inputs(keys, 64, device="cuda")]
        weight = torch.randn_like(inputs[0])
        plain = torch.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=keys.mask_BKL[:, None], enable_gqa=True
        )
        fused = keys.attend(*(t.to(dtype) for t in inputs))
        expected, found = (torch.autograd.grad((out * weight).sum(), inputs) for out in (plain, fused))
        for a, b in zip((fused, *found), (plain, *expected), strict=True):
            assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("kv_cache", ["recursion", "shared", "hybrid"])
@pytest.mark.parametrize("router", ["none", "gate", "token_choice", "fixed"])
def test_documents_in_one_row_train_as_rows_of_their_own(router, kv_cache):
    """Losses of the tokens inside documents, and their gradients. Six tokens are whole rounds of the fixed depths."""
    settings = {"balancing": "none"} if router == "token_choice" else {}
    model = tiny_model(router=router, kv_cache=kv_cache, sharing="middle_cycle", **settings).train()
    ids, documents = random_ids(2, 18), torch.tensor([[0] * 6 + [1] * 12, [7] * 12 + [7, 3, 3, 3, 3, 3]])
    documents[1, 12] = 3
    pieces = [(0, 0, 6), (0, 6, 18), (1, 0, 12), (1, 12, 18)]
    targets = sum(stop - start - 1 for _, start, stop in pieces)
    labels = ids.masked_fill(torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0)), -100)
    together = model(ids, labels=labels, document_ids=documents, num_items_in_batch=targets).loss
    alone = [ids[row : row + 1, start:stop] for row, start, stop in pieces]
    apart = sum(model(piece, labels=piece, num_items_in_batch=targets).loss for piece in alone)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (together, apart)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
