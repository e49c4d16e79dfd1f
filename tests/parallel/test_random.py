"""Every random state of a rank comes back whole."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from parallel.random import random_states, restore_random_states
from tests.ranks import run_ranks


def draws() -> list[Any]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(3).tolist()
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        tracked,
    ]


def draw_restore_draw(rank: int) -> list[list[Any]]:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7 + rank)
    draws()  # A state in the middle of a stream, with a normal draw left over in Python and NumPy.
    states = random_states()
    first = draws()
    later = draws()
    restore_random_states(states)
    return [first, later, draws()]


def test_what_is_drawn_after_restoring_is_what_was_drawn_after_saving() -> None:
    for first, later, again in run_ranks(2, draw_restore_draw):
        assert again == first
        assert all(a != b for a, b in zip(first, later, strict=True))
