import random

import numpy as np
import torch

from mor.train import random_state


def draw():
    normal = np.random.normal(size=3).tolist()  # noqa: NPY002, legacy generator on purpose
    return torch.rand(3).tolist(), torch.randn(5).tolist(), normal, random.gauss(0, 1), random.random()


def test_a_restored_state_draws_the_same_numbers():
    random_state.seed_all(7)
    first = draw()
    tensors, values = random_state.capture()
    expected = draw()
    assert first != expected
    draw()
    random_state.restore(tensors, values)
    assert draw() == expected


def test_seeding_reaches_every_generator():
    random_state.seed_all(3)
    expected = draw()
    random_state.seed_all(3)
    assert draw() == expected
    random_state.seed_all(4)
    assert all(a != b for a, b in zip(draw(), expected))
