import pytest
import torch

from mor.train.precision import autocast, choose_device, choose_precision

CPU = torch.device("cpu")


def test_the_cpu_computes_in_float32():
    assert choose_device("cpu") == CPU
    assert choose_precision("auto", CPU) == choose_precision("float32", CPU) == torch.float32
    with pytest.raises(ValueError, match="precision='bfloat16' needs a CUDA device"):
        choose_precision("bfloat16", CPU)
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:999"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(ValueError, match=f"device='{name}' cannot be used here"):
        choose_device(name)


@pytest.mark.gpu
def test_cuda_computes_matrix_products_in_bfloat16():
    device = choose_device("auto")
    assert device.type == "cuda"
    assert choose_precision("auto", device) == torch.bfloat16
    assert choose_precision("float32", device) == torch.float32
    x = torch.ones(2, 2, device=device)
    with autocast(device, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
