"""Each collective against what it means, computed from every rank's input."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from parallel import collectives
from parallel.ledger import Ledger
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks

SHAPE = (6, 2, 5)


def tensor_of(rank: int, strided: bool) -> torch.Tensor:
    tensor = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if strided else tensor


def results(rank: int, size: int, strided: bool) -> list[str]:
    """The names of the collectives that went wrong on this rank."""
    group = parallel_state.get_tensor_model_parallel_group()
    everyone = [tensor_of(other, strided) for other in range(size)]
    total = torch.stack(everyone).sum(0)
    expected: dict[Callable[..., torch.Tensor], torch.Tensor] = {
        collectives.all_reduce: total,
        collectives.all_gather: torch.cat(everyone),
        collectives.reduce_scatter: total.chunk(size)[rank],
    }
    wrong = []
    for collective, right in expected.items():
        mine = tensor_of(rank, strided)
        found = collective(mine, group)
        if found.shape != right.shape or (found - right).abs().max() > 1e-14 or not torch.equal(mine, everyone[rank]):
            wrong.append(collective.__name__)
    mine = tensor_of(rank, strided)
    found = collectives.all_reduce_(mine, group)
    if (found - total).abs().max() > 1e-14 or (not strided and found is not mine):
        wrong.append("all_reduce_")
    return wrong


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_collectives_give_what_they_mean_and_leave_their_input(size: int, strided: bool) -> None:
    assert run_ranks(size, results, size, strided) == [[]] * size


def of_integers(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    return collectives.all_gather(torch.tensor([rank]), group), collectives.all_reduce(torch.tensor(rank + 1), group)


def test_scalars_and_integers_too() -> None:
    for gathered, total in run_ranks(3, of_integers):
        assert gathered.tolist() == [0, 1, 2] and total.item() == 6


def test_a_group_of_one_is_free() -> None:
    group = dist.ProcessGroup(0, 1)  # It has no backend: a call would raise.
    tensor = torch.randn(3, 2)
    with Ledger() as ledger:
        for name in ("all_reduce", "all_reduce_", "all_gather", "reduce_scatter"):
            assert getattr(collectives, name)(tensor, group) is tensor
    assert ledger.entries == []


def uneven(rank: int) -> str:
    with pytest.raises(ValueError) as raised:
        collectives.reduce_scatter(torch.zeros(5, 2), parallel_state.get_tensor_model_parallel_group())
    return str(raised.value)


def test_rows_that_do_not_divide_are_refused() -> None:
    assert run_ranks(2, uneven, sizes=ParallelSizes(tensor=2))[0] == "cannot scatter 5 rows over 2 ranks evenly"
