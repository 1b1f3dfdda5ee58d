import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.token_set import TokenSet

masks = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda size: st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=rows, max_size=rows).map(
            torch.tensor
        )
    )
)


@given(masks)
def test_gathered_members_are_the_masked_tokens_in_order(mask):
    tokens = TokenSet.from_mask(mask)
    values = torch.arange(mask.numel()).view(mask.shape)
    gathered = tokens.gather(values)
    for row in range(len(mask)):
        assert gathered[row][tokens.valid_BK[row]].tolist() == values[row][mask[row]].tolist()
    assert torch.equal(tokens.mask(mask.shape, mask.device), mask)


@given(masks, st.integers(0, 5))
def test_add_touches_members_only(mask, seed):
    torch.manual_seed(seed)
    tokens = TokenSet.from_mask(mask)
    x, delta = torch.randn(*mask.shape, 3), torch.randn(len(mask), tokens.index_BK.shape[1], 3)
    out = tokens.add(x, delta)
    assert torch.equal(out[~mask], x[~mask])
    for row in range(len(mask)):
        assert torch.equal(out[row][mask[row]], x[row][mask[row]] + delta[row][tokens.valid_BK[row]])


@given(masks, st.integers(0, 5))
def test_composition_picks_out_of_the_members(mask, seed):
    outer = TokenSet.from_mask(mask)
    torch.manual_seed(seed)
    inner = TokenSet.from_mask((torch.rand(outer.index_BK.shape) < 0.5) & outer.valid_BK)
    both = outer.compose(inner)
    values = torch.arange(mask.numel()).view(mask.shape)
    assert torch.equal(both.gather(values), inner.gather(outer.gather(values)))


def test_even_sets_have_no_empty_places():
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    tokens = TokenSet.from_even_mask(mask, 2)
    assert (tokens.index_BK.tolist(), tokens.valid_BK) == ([[0, 2], [1, 2]], None)
    assert TokenSet.from_even_mask(torch.ones(2, 4).bool(), 4).is_everything
    assert TokenSet.from_even_mask(torch.zeros(2, 4).bool(), 0).is_empty


def test_top_keeps_causal_order_and_everything_needs_no_index():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert TokenSet.top(score, 2).index_BK.tolist() == [[1, 3]]
    assert TokenSet.top(score, 4).is_everything
    assert TokenSet().compose(TokenSet.top(score, 2)).index_BK.tolist() == [[1, 3]]


@pytest.mark.parametrize("size", [1, 3])
def test_rows_without_members_are_reported(size):
    mask = torch.zeros(3, size, dtype=torch.bool)
    assert TokenSet.from_mask(mask).is_empty
    mask[1, 0] = True
    assert TokenSet.from_mask(mask).active_rows().tolist() == [1]
    assert TokenSet().active_rows() is None
