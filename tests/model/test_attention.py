import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor.model.attention import AttentionScope, attend, repeat_groups
from mor.model.forward_pass import OwnKeysValues


def heads(number, *, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, 40, 32, generator=generator).to(device)


def scope():
    nothing = torch.zeros(0)
    return AttentionScope(cos_BKE=nothing, sin_BKE=nothing, keys_values=OwnKeysValues())


def test_groups_repeated_are_groups_shared():
    query, key, value = heads(6, seed=0), heads(3, seed=1), heads(3, seed=2)
    repeated = repeat_groups(key, 6)
    assert all(torch.equal(repeated[:, head], key[:, head // 2]) for head in range(6))
    assert repeat_groups(query, 6) is query
    grouped = attend(query, key, value, scope(), 0.0)
    torch.testing.assert_close(attend(query, repeated, repeat_groups(value, 6), scope(), 0.0), grouped)


@pytest.mark.gpu
def test_groups_in_float32_run_in_a_fused_kernel():
    query, key, value = (heads(n, seed=n, device="cuda") for n in (6, 3, 3))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = attend(query, key, value, scope(), 0.0)
    expected = attend(query.cpu(), key.cpu(), value.cpu(), scope(), 0.0)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
