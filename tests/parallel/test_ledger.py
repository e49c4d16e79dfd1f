"""Every collective is recorded once, with what it moves, its group and its direction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from torch.distributed import all_reduce as bound_at_import
from torch.utils.checkpoint import checkpoint

from parallel.ledger import Entry, Ledger, _kind
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.float32)


def peer(rank: int, send: Callable[..., Any], receive: Callable[..., Any]) -> None:
    """From rank 0 to rank 1."""
    work = send(ones(6), 1) if rank == 0 else receive(ones(6), 0)
    if isinstance(work, dist.Work):
        work.wait()


def both_ways(rank: int) -> None:
    ops = [dist.P2POp(dist.isend, ones(6), 1 - rank), dist.P2POp(dist.irecv, ones(2, 3), 1 - rank)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def coalesced() -> None:
    with dist._coalescing_manager(group=dist.group.WORLD):
        dist.all_reduce(ones(6))
        dist.all_reduce(ones(2))


# Name -> (call on a rank, [(kind, shape on rank 1)]).
CALLS: dict[str, tuple[Callable[[int], Any], list[tuple[str, tuple[int, ...]]]]] = {
    "all_reduce": (lambda r: dist.all_reduce(ones(2, 3)), [("all_reduce", (2, 3))]),
    "async": (lambda r: dist.all_reduce(ones(2, 3), async_op=True).wait(), [("all_reduce", (2, 3))]),
    "all_reduce_coalesced": (lambda r: dist.all_reduce_coalesced([ones(6), ones(2)]), [("all_reduce", (8,))]),
    "coalescing manager": (lambda r: coalesced(), [("all_reduce", (8,))]),
    "bound at import": (lambda r: bound_at_import(ones(3)), [("all_reduce", (3,))]),
    "all_gather": (lambda r: dist.all_gather([ones(3), ones(3)], ones(3)), [("all_gather", (6,))]),
    "all_gather_into_tensor": (lambda r: dist.all_gather_into_tensor(ones(4, 2), ones(2, 2)), [("all_gather", (4, 2))]),
    "all_gather_coalesced": (
        lambda r: dist.all_gather_coalesced([[ones(3), ones(1)], [ones(3), ones(1)]], [ones(3), ones(1)]),
        [("all_gather", (8,))],
    ),
    "reduce_scatter": (lambda r: dist.reduce_scatter(ones(3), [ones(3), ones(3)]), [("reduce_scatter", (6,))]),
    "reduce_scatter_tensor": (
        lambda r: dist.reduce_scatter_tensor(ones(2, 2), ones(4, 2)),
        [("reduce_scatter", (4, 2))],
    ),
    "broadcast": (lambda r: dist.broadcast(ones(6), 0), [("broadcast", (6,))]),
    "reduce": (lambda r: dist.reduce(ones(6), 0), [("reduce", (6,))]),
    "gather": (lambda r: dist.gather(ones(3), [ones(3), ones(3)] if r == 1 else None, 1), [("gather", (6,))]),
    "scatter": (lambda r: dist.scatter(ones(3), [ones(3), ones(3)] if r == 1 else None, 1), [("scatter", (6,))]),
    "all_to_all": (lambda r: dist.all_to_all([ones(3), ones(3)], [ones(3), ones(3)]), [("all_to_all", (6,))]),
    "all_to_all_single": (lambda r: dist.all_to_all_single(ones(6), ones(6)), [("all_to_all", (6,))]),
    "send, recv": (lambda r: peer(r, dist.send, dist.recv), [("recv", (6,))]),
    "isend, irecv": (lambda r: peer(r, dist.isend, dist.irecv), [("recv", (6,))]),
    "recv from any": (lambda r: peer(r, dist.send, lambda tensor, _: dist.recv(tensor)), [("recv", (6,))]),
    "batch": (both_ways, [("send", (6,)), ("recv", (2, 3))]),
    "functional": (lambda r: functional.all_gather_tensor(ones(3), 0, dist.group.WORLD) + 0, [("all_gather", (6,))]),
    "functional sum": (lambda r: functional.all_reduce(ones(3), "sum", dist.group.WORLD) + 0, [("all_reduce", (3,))]),
}


def record(rank: int) -> dict[str, tuple[list[Entry], str]]:
    found = {}
    for name, (call, _) in CALLS.items():
        with Ledger() as ledger:
            call(rank)
        found[name] = ledger.entries, dist.group.WORLD.group_name
    with Ledger() as ledger:
        dist.barrier()
        dist.monitored_barrier()
        torch.ones(3) @ torch.ones(3)
    return found | {"barriers": (ledger.entries, dist.group.WORLD.group_name)}


def test_every_kind_once_with_bytes_and_group() -> None:
    sent, found = run_ranks(2, record)
    for name, (_, expected) in CALLS.items():
        entries, world = found[name]
        assert [(entry.kind, entry.shape) for entry in entries] == expected, name
        for entry in entries:
            assert entry.bytes == 4 * entry.elements and entry.group == world and entry.direction == "forward", name
    assert [entry.kind for entry in found["barriers"][0]] == ["barrier", "barrier"]
    assert [entry.kind for entry in sent["send, recv"][0]] == ["send"]
    assert sent["gather"][0][0].shape == (3,)  # No root: it has its piece only.


def test_no_operator_of_torch_is_unknown() -> None:
    known_others = {"check_for_nan", "wait_tensor", "_wrap_tensor_autograd"}
    names = torch._C._dispatch_get_all_op_names()
    ours = [name for name in names if name.split("::")[0] in ("c10d", "_c10d_functional", "c10d_functional")]
    assert len(ours) > 20
    assert [name for name in ours if _kind(name) is None and name.split("::")[1] not in known_others] == []
    assert _kind("aten::add") is None and _kind("aten::gather") is None


class SumInBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (_,) = ctx.saved_tensors  # What recomputation brings back.
        dx = torch.cat([dy, dy])
        dist.all_reduce(dx)
        return dx[: len(dx) // 2]


def both_directions(rank: int, recompute: bool) -> list[tuple[str, tuple[int, ...]]]:
    x = ones(3).requires_grad_()
    with Ledger() as ledger:
        y = checkpoint(SumInBoth.apply, x, use_reentrant=False) if recompute else SumInBoth.apply(x)
        (y * y.detach()).sum().backward()
        SumInBoth.apply(x.detach())
    return [(entry.direction, entry.shape) for entry in ledger.entries]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_engine_runs_is_backward(recompute: bool) -> None:
    again = [("backward", (3,))] if recompute else []
    for found in run_ranks(2, both_directions, recompute):
        assert found == [("forward", (3,)), *again, ("backward", (6,)), ("forward", (3,))]


def of_megatron(rank: int) -> dict[str, list[Entry]]:
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    x = ones(4, 3).requires_grad_()
    with Ledger() as ledger:
        y = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        dist.all_reduce(ones(5), group=pipeline)
        y.sum().backward()
    return {
        "all": ledger.entries,
        "tensor": ledger.select(group=tensor),
        "pipeline": ledger.select(group=pipeline),
        "gathers": ledger.select(kind="all_gather"),
        "backward": ledger.select(direction="backward"),
        "both": ledger.select(kind="all_gather", direction="backward"),
    }


def test_megatrons_collectives_and_what_is_selected() -> None:
    for found in run_ranks(4, of_megatron, sizes=ParallelSizes(tensor=2, pipeline=2)):
        gather, reduce, scatter = found["all"]
        assert [(entry.kind, entry.shape) for entry in found["all"]] == [
            ("all_gather", (8, 3)), ("all_reduce", (5,)), ("reduce_scatter", (8, 3))
        ]  # fmt: skip
        assert found["tensor"] == [gather, scatter] and found["pipeline"] == [reduce]
        assert found["gathers"] == [gather] and found["backward"] == [scatter] and found["both"] == []
