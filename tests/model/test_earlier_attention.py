import pytest
import torch

from mor.model.earlier_attention import attend_blocks, attend_earlier, block_mask, earlier_mask


def places(kept, size, batch=2):
    """Random ascending places with a few absent, out-of-order ones at the end."""
    ordered = torch.stack([torch.randperm(size)[:kept].sort().values for _ in range(batch)])
    ordered[0, -3:] = torch.tensor([0, 1, 2])
    return ordered


@pytest.mark.parametrize(("kept", "size"), [(128, 256), (300, 512), (200, 333), (513, 600)])
def test_blocks_cover_exactly_what_is_seen(kept, size):
    place = places(kept, size)
    mask = block_mask(place, size)
    seen = earlier_mask(place, size)
    for row in range(2):
        for block in range(mask.kv_num_blocks.shape[2]):
            rows = seen[row, block * 128 : (block + 1) * 128]
            whole = int(mask.full_kv_num_blocks[row, 0, block])
            part = mask.kv_indices[row, 0, block, : mask.kv_num_blocks[row, 0, block]].tolist()
            assert rows[:, : whole * 128].all()
            assert not rows[:, (whole + len(part)) * 128 :].any()
            assert part == list(range(whole, whole + len(part)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kept", "size"), [(128, 256), (200, 333)])
def test_the_block_sparse_twin_equals_the_masked_attention(kept, size):
    place = places(kept, size)
    query, key, value = torch.randn(2, 4, kept, 16), torch.randn(2, 2, size, 16), torch.randn(2, 2, size, 16)
    torch.testing.assert_close(
        attend_blocks(query, key, value, place), attend_earlier(query, key, value, place), atol=1e-5, rtol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by inductor itself
def test_the_compiled_twin_equals_the_masked_attention_with_gradients():
    place = places(700, 1024).cuda()
    shapes = ((2, 6, 700, 64), (2, 2, 1024, 64), (2, 2, 1024, 64))
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], device="cuda")
    mask = earlier_mask(place, 1024).unsqueeze(1)
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad((plain * weight).sum(), inputs)
    fused = attend_earlier(*inputs, place)
    found = torch.autograd.grad((fused * weight).sum(), inputs)
    for a, b in zip((fused, *found), (plain, *expected), strict=True):
        assert (a - b).norm() / b.norm() < 5e-3  # the kernel multiplies in tf32
