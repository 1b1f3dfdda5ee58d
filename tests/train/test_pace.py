import pytest
import torch

from mor.model.cost import TRAINING_FACTOR, complete_flops, training_flops
from mor.train import pace
from mor.train.pace import Pace, matmul_ceiling, peak_memory_gib, training_flops_per_token
from mor.train.ranks import Ranks
from tests.train.test_window import config

CPU = torch.device("cpu")


def test_flops_follow_the_share_of_active_tokens():
    made = config("token_choice", vocab_size=100)
    counted = training_flops_per_token(made, 100, [1.0, 0.5, 0.25])
    assert counted == TRAINING_FACTOR * complete_flops(made, 100, active=[100, 50, 25]) / 100
    assert training_flops_per_token(made, 100, [1.0, 1.0, 1.0]) > 1.5 * counted
    plain = config("none")
    assert training_flops_per_token(plain, 64, [1.0] * 3) * 640 == training_flops(plain, 640, sequence_length=64)


def test_the_ceiling_is_a_speed_of_this_machine_and_draws_nothing():
    state = torch.get_rng_state()
    assert 1e8 < matmul_ceiling(CPU, torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_the_shortest_time_counts(monkeypatch):
    moments = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(moments))
    assert matmul_ceiling(CPU, torch.float32) == 2 * 1024**3 / 2.0


def test_utilisation_is_speed_times_cost_over_the_ceiling_of_all_ranks(monkeypatch):
    class Two(Ranks):
        """Two ranks that answer alike, but for memory: the other takes twice as much."""

        def each(self, action):
            value = action()
            return [value, 2 * value]

    monkeypatch.setattr(pace, "matmul_ceiling", lambda device, dtype: 1000.0)
    monkeypatch.setattr(pace, "peak_memory_gib", lambda device: 3.0)
    measured = Pace(CPU, torch.float32, Two())
    measured.add(1.5, 100)
    measured.add(0.5, 100)
    assert measured.speed(6.0) == {"tokens_per_second": 100.0, "mfu": pytest.approx(100 * 6 / 3000)}
    assert measured.peak_memory_gib() == 6.0
    measured.clear()
    measured.add(1.0, 10)
    assert measured.speed(6.0)["tokens_per_second"] == 10.0


def test_a_process_measures_the_ceiling_once(monkeypatch):
    asked = []

    def measure(device, dtype):
        asked.append(dtype)
        return 1000.0

    monkeypatch.setattr(pace, "matmul_ceiling", measure)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        measured = Pace(CPU, dtype, Ranks())
        measured.add(1.0, 100)
        assert measured.speed(5.0)["mfu"] == 0.5
    assert asked == [torch.float32, torch.bfloat16]


def test_peak_memory_on_the_host_is_that_of_the_process():
    before = peak_memory_gib(CPU)
    held = torch.ones(int(before * 2**30 / 4) + 2**24)
    assert peak_memory_gib(CPU) >= held.numel() * 4 / 2**30 > before


@pytest.mark.gpu
def test_on_a_gpu_only_tensors_count_from_the_start_on_and_reading_waits_for_nothing():
    device = torch.device("cuda")
    earlier = torch.ones(2**28, device=device)
    del earlier
    measured = Pace(device, torch.bfloat16, Ranks())
    base = torch.cuda.memory_allocated() / 2**30
    held = torch.ones(2**26, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert measured.peak_memory_gib() == pytest.approx(base + held.numel() * 4 / 2**30, abs=0.01)
        measured.add(1.0, 1000)
        assert 1e13 < 1000 * 1e9 / measured.speed(1e9)["mfu"] < 5e15
    finally:
        torch.cuda.set_sync_debug_mode("default")
