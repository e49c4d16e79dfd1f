"""The peak is the greatest rank's, in bytes, and does not fall."""

import torch

from parallel.memory import peak_memory
from tests.ranks import run_ranks

MORE = 200 * 2**20


def peaks(rank: int) -> tuple[int, int, int]:
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    if rank == 1:
        held = torch.ones(2 * MORE // 4)
        during = peak_memory(cpu)
        del held
    else:
        during = peak_memory(cpu)
    return before, during, peak_memory(cpu)


def test_the_peak_is_that_of_the_rank_that_used_most() -> None:
    one, other = run_ranks(2, peaks)
    assert one == other
    before, during, after = one
    assert MORE < during - before < 4 * MORE
    assert after >= during
