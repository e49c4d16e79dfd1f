"""Names are the same on every stage and chunk, however the layers are dealt out."""

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from parallel.sizes import ParallelSizes
from parallel.stages import as_chunks, named_modules, named_parameters, union_over_stages, unwrap
from tests import gpt
from tests.ranks import run_ranks

Names = dict[str, list[str]]


def names(rank: int, sizes: ParallelSizes, changes: dict[str, Any]) -> list[Names]:
    """Of each chunk of this rank: modules, parameters, and the modules that have a layer number of their own."""
    found = []
    for chunk in gpt.build(sizes, **changes):
        layers = [f"{name} {module.layer_number}" for name, module in named_modules(chunk) if name.count(".") == 2]
        found.append(
            {
                "modules": [name for name, _ in named_modules(chunk)],
                "parameters": [name for name, _ in named_parameters(chunk)],
                "layers": layers,
            }
        )
    return found


def together(ranks: list[list[Names]], kind: str) -> list[str]:
    return sorted(name for chunks in ranks for chunk in chunks for name in chunk[kind])


PP2 = ParallelSizes(pipeline=2)
VPP2 = ParallelSizes(pipeline=2, virtual_pipeline=2)
# How 6 layers are dealt out, and how many each chunk gets, by rank.
DEALS: list[tuple[ParallelSizes, dict[str, Any], list[list[int]]]] = [
    (PP2, {}, [[3], [3]]),
    (ParallelSizes(pipeline=3), {}, [[2], [2], [2]]),
    (ParallelSizes(pipeline=3, virtual_pipeline=2), {}, [[1, 1], [1, 1], [1, 1]]),
    (PP2, {"num_layers_in_first_pipeline_stage": 1}, [[1], [5]]),
    (PP2, {"num_layers_in_last_pipeline_stage": 2}, [[4], [2]]),
    (VPP2, {"num_layers_in_first_pipeline_stage": 4}, [[2, 2], [1, 1]]),
    (PP2, {"pipeline_model_parallel_layout": "Ettttt|tL"}, [[5], [1]]),
    (PP2, {"pipeline_model_parallel_layout": "Etttttt|L"}, [[6], [0]]),
    (VPP2, {"pipeline_model_parallel_layout": "E|ttt|tt|tL"}, [[0, 2], [3, 1]]),
]


@pytest.mark.parametrize(("sizes", "changes", "counts"), DEALS)
def test_names_are_global(sizes: ParallelSizes, changes: dict[str, Any], counts: list[list[int]]) -> None:
    one = run_ranks(1, names, ParallelSizes(), {"num_layers": 6}, sizes=ParallelSizes())
    ranks = run_ranks(sizes.pipeline, names, sizes, {"num_layers": 6, **changes}, sizes=sizes)
    assert [[len(chunk["layers"]) for chunk in chunks] for chunks in ranks] == counts
    assert together(ranks, "layers") == [f"decoder.layers.{number} {number + 1}" for number in range(6)]
    assert together(ranks, "parameters") == together(one, "parameters")
    assert set(together(ranks, "modules")) == set(together(one, "modules"))
    assert len([name for name in together(ranks, "modules") if ".layers." in name]) == len(
        [name for name in together(one, "modules") if ".layers." in name]
    )


def test_the_same_names_as_torchs_on_one_stage() -> None:
    def check(rank: int) -> None:
        [chunk] = gpt.build(ParallelSizes())
        assert list(named_modules(chunk)) == list(chunk.named_modules())
        assert sorted(named_parameters(chunk)) == sorted(chunk.named_parameters())

    run_ranks(1, check)


def test_a_shared_parameter_comes_once() -> None:
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2)
    module.b.weight = module.a.weight
    assert [name for name, _ in named_parameters(module)] == ["a.weight", "b.bias"]
    assert [name for name, _ in named_parameters(module.a)] == ["weight"]


def wrapped(rank: int) -> None:
    chunk = gpt.build(ParallelSizes(), params_dtype=torch.float32)[0]
    half = Float16Module(gpt.config_of(ParallelSizes(), params_dtype=torch.float32, bf16=True), chunk)
    ddp = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), module=half)
    assert unwrap(ddp) is chunk and unwrap(half) is chunk and unwrap(chunk) is chunk
    for model in (chunk, ddp, [chunk], [ddp], (half,)):
        assert as_chunks(model) == [chunk]


def test_wrappers_are_taken_off() -> None:
    run_ranks(1, wrapped)


def union(rank: int) -> set[str]:
    mine = {f"stage {rank // 2}", "both"}
    joined = union_over_stages(mine)
    assert mine == {f"stage {rank // 2}", "both"}
    return joined


def test_the_union_is_that_of_all_stages() -> None:
    found = run_ranks(4, union, sizes=ParallelSizes(tensor=2, pipeline=2))
    assert found == [{"stage 0", "stage 1", "both"}] * 4
    assert run_ranks(2, union, sizes=ParallelSizes()) == [{"stage 0", "both"}] * 2
