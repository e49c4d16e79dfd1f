"""What is recorded is what the ledger sees below it; nothing stays replaced."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from parallel.ledger import Entry, Ledger, kind_of_method
from parallel.sizes import ParallelSizes
from parallel.traffic import Flow, Traffic
from tests import gpt
from tests.parallel.test_ledger import CALLS
from tests.ranks import run_ranks


def record(rank: int) -> dict[str, tuple[list[Entry], list[Entry]]]:
    found = {}
    methods = {name: method for name, method in vars(dist.ProcessGroup).items() if kind_of_method(name)}
    for name, (call, _) in CALLS.items():
        with Ledger() as ledger, Traffic() as traffic:
            call(rank)
        found[name] = ledger.entries, traffic.entries
    assert len(methods) > 15 and all(vars(dist.ProcessGroup)[name] is method for name, method in methods.items())
    with Traffic() as after:
        pass
    dist.all_reduce(torch.ones(3))
    assert after.entries == []
    return found


def test_every_call_of_torch_distributed_is_what_the_ledger_sees() -> None:
    for found in run_ranks(2, record):
        for name, (below, ours) in found.items():
            # A functional collective calls the dispatcher itself.
            assert ours == ([] if name.startswith("functional") else below), name
    assert any(name.startswith("functional") for name in CALLS)


def step(rank: int) -> tuple[list[Entry], list[Entry], list[Flow], list[str]]:
    chunks = gpt.build(ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True))
    with Ledger() as ledger, Traffic() as traffic:
        gpt.run(chunks)
    alone = {parallel_state.get_data_parallel_group().group_name}
    return [entry for entry in ledger.entries if entry.group not in alone], traffic.entries, list(traffic.flows()), [
        parallel_state.get_tensor_model_parallel_group().group_name
    ]  # fmt: skip


def test_a_step_of_megatrons_schedule() -> None:
    sizes = ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True)
    for below, ours, flows, (tensor_group,) in run_ranks(4, step, sizes=sizes):
        assert ours == below and len(ours) > 20
        assert {(flow.axis, flow.size) for flow in flows} >= {
            ("tensor model parallel", 2),
            ("pipeline model parallel", 2),
        }
        assert {flow.direction for flow in flows} == {"forward", "backward"}
        tensor = [entry for entry in ours if entry.group == tensor_group]
        for what in ("count", "bytes"):
            along: Any = sum(getattr(flow, what) for flow in flows if flow.axis == "tensor model parallel")
            assert along == sum(1 if what == "count" else entry.bytes for entry in tensor)
        assert [flow.bytes for flow in flows] == sorted((flow.bytes for flow in flows), reverse=True)
        assert sum(flow.count for flow in flows) == len(ours)
