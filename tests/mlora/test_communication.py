"""What an adapter adds to the communication of a layer: nothing of the size of the hidden states, and little of the rank's.

T tokens of the whole micro batch, r the rank of one projection. A fused linear's projections share one collective, whose width is
the sum of their ranks: 3 r of linear_qkv and 2 r of linear_fc1, r with ``shared_A``; linear_proj and linear_fc2 have r. The budget
of 8 T r elements a layer, forward and backward together, is held against r, not against such a sum, and a collective counts with
its whole tensor: the result of a gather, the input of a scatter, the tensor that is reduced.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.dropout import MicroBatch, set_micro_batch
from parallel.ledger import Entry, Ledger
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks

LAYERS, RANK = 2, 2
TOKENS = gpt.LENGTH * gpt.ROWS


@dataclass(frozen=True)
class Case:
    """An adapter, and the multiples of T r that a layer's collectives of it have: all-reduces, or reduce-scatters with SP."""

    config: LoraConfig
    plain: tuple[int, ...]
    scattered: tuple[int, ...]
    changes: tuple[tuple[str, Any], ...] = ()


ALL = (3, 1, 2, 1)  # In backward: d of linear_qkv, p of linear_proj, d of linear_fc1, p of linear_fc2.
CASES = {
    "all": Case(LoraConfig(r=RANK), ALL, (3, 2)),
    "dropout": Case(LoraConfig(r=RANK, lora_dropout=0.3), ALL, (3, 2)),
    "shared A": Case(LoraConfig(r=RANK, shared_A=True, lora_dropout=0.3), (1, 1, 1, 1), (1, 1)),
    "q and v": Case(LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]), (2,), (2,)),
    "down": Case(LoraConfig(r=RANK, target_modules=["down_proj"]), (1,), ()),
    "few groups": Case(LoraConfig(r=RANK), ALL, (3, 2), (("num_query_groups", 2),)),
    "recompute": Case(
        LoraConfig(r=RANK, lora_dropout=0.3),
        ALL,
        (3, 2),
        (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1)),
    ),
}


def entries(sizes: ParallelSizes, config: LoraConfig | None, changes: dict[str, Any]) -> list[Entry]:
    """The collectives of the layers in one forward and backward pass, also to the gradient of their input."""
    [chunk] = gpt.build(sizes, num_layers=LAYERS, **changes)
    chunk.requires_grad_(False)
    if config is not None:
        mlora.apply([chunk], config)
        gpt.fill_adapter([chunk])
    set_micro_batch(MicroBatch(0, 0))
    length = gpt.LENGTH // (sizes.tensor if sizes.sequence_parallel else 1)
    x = gpt.values("x", length, gpt.ROWS, gpt.HIDDEN).requires_grad_()
    rotary = chunk.rotary_pos_emb(gpt.LENGTH)
    with Ledger() as ledger:
        y = chunk.decoder(x, None, rotary_pos_emb=rotary)
        y.square().sum().backward()
    assert x.grad is not None
    return ledger.entries


class Sent(NamedTuple):
    """An entry without its shape: ours are [tokens, features] where Megatron's are [s, b, features]."""

    kind: str
    direction: str
    group: str
    elements: int
    bytes: int


def sizes_of(found: list[Entry]) -> Counter[Sent]:
    return Counter(Sent(entry.kind, entry.direction, entry.group, entry.elements, entry.bytes) for entry in found)


def frozen_and_adapted(rank: int, sizes: ParallelSizes) -> tuple[dict[str, tuple[list[Entry], list[Entry]]], str]:
    """(case -> the frozen model's entries and the adapted one's, name of the tensor-parallel group)."""
    found = {}
    for name, case in CASES.items():
        changes = dict(case.changes)
        found[name] = entries(sizes, None, changes), entries(sizes, case.config, changes)
    return found, parallel_state.get_tensor_model_parallel_group().group_name


LAYOUTS = [ParallelSizes(tensor=t, sequence_parallel=sp) for t in (2, 4) for sp in (False, True)]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: f"TP{sizes.tensor}{'+SP' * sizes.sequence_parallel}")
def test_a_layer_sends_the_frozen_models_tensors_and_few_of_rank_size(sizes: ParallelSizes) -> None:
    for cases, group in run_ranks(sizes.tensor, frozen_and_adapted, sizes, sizes=sizes):
        for name, (frozen, adapted) in cases.items():
            for direction in ("forward", "backward"):
                assert sum(entry.direction == direction for entry in frozen) >= 2 * LAYERS
            assert not sizes_of(frozen) - sizes_of(adapted), f"{name}: a collective of the frozen model's is gone"
            added = [Sent(*sent) for sent in (sizes_of(adapted) - sizes_of(frozen)).elements()]
            expected = CASES[name].scattered if sizes.sequence_parallel else CASES[name].plain
            kind = "reduce_scatter" if sizes.sequence_parallel else "all_reduce"
            assert {(sent.kind, sent.direction, sent.group) for sent in added} <= {(kind, "backward", group)}, name
            lengths = sorted(sent.elements for sent in added)
            assert lengths == sorted([multiple * TOKENS * RANK for multiple in expected] * LAYERS), name
            assert all(length < TOKENS * gpt.HIDDEN for length in lengths), name
            assert sum(lengths) <= LAYERS * 8 * TOKENS * RANK, name


def lora_and_dora(rank: int, sizes: ParallelSizes) -> dict[float, tuple[list[Entry], list[Entry]]]:
    """Dropout -> the entries of LoRA, and those of DoRA."""
    pairs = {
        p: (LoraConfig(r=RANK, lora_dropout=p), LoraConfig(r=RANK, lora_dropout=p, use_dora=True)) for p in (0, 0.3)
    }
    return {p: (entries(sizes, lora, {}), entries(sizes, dora, {})) for p, (lora, dora) in pairs.items()}


@pytest.mark.parametrize("sizes", LAYOUTS[:2], ids=str)
def test_dora_sends_one_number_a_row_of_the_linears_whose_columns_are_divided(sizes: ParallelSizes) -> None:
    for found in run_ranks(sizes.tensor, lora_and_dora, sizes, sizes=sizes):
        for dropout, (lora, dora) in found.items():
            assert not sizes_of(lora) - sizes_of(dora)
            added = [(e.kind, e.direction, e.elements) for e in (sizes_of(dora) - sizes_of(lora)).elements()]
            expected = [("all_reduce", "forward", gpt.HIDDEN)] * 2 * LAYERS
            # The gradient of the magnitudes, where the output is scaled before the sum and Megatron sums nothing.
            if dropout and not sizes.sequence_parallel:
                expected += [("all_reduce", "backward", gpt.HIDDEN)] * 2 * LAYERS
            assert sorted(added) == sorted(expected), dropout


def inference(rank: int, sizes: ParallelSizes) -> tuple[list[Entry], list[Entry]]:
    found = []
    for config in (None, CASES["all"].config):
        chunks = gpt.build(sizes)
        if config is not None:
            mlora.apply(chunks, config)
        with Ledger() as ledger:
            gpt.run(chunks, count=1, forward_only=True)
        found.append(ledger.entries)
    return found[0], found[1]


@pytest.mark.parametrize("sizes", LAYOUTS[:2], ids=str)
def test_forward_alone_sends_nothing_more(sizes: ParallelSizes) -> None:
    for frozen, adapted in run_ranks(sizes.tensor, inference, sizes, sizes=sizes):
        assert Counter(adapted) == Counter(frozen) and len(frozen) > 2 * gpt.LAYERS


def finalized(rank: int, sizes: ParallelSizes) -> tuple[int, int, int]:
    """(elements that Megatron's finalize step sums over the tensor-parallel group, those of the replicated factors, calls)."""
    chunks = gpt.build(sizes, params_dtype=torch.float32)
    mlora.apply(chunks, CASES["all"].config)
    wrapped = DistributedDataParallel(chunks[0].config, DistributedDataParallelConfig(), module=chunks[0])
    group = parallel_state.get_tensor_model_parallel_group()
    with Ledger() as ledger:
        finalize_model_grads([wrapped])
    sums = ledger.select(group=group)
    replicated = sum(factor.parameter.numel() for factor in factors(chunks) if factor.replicated)
    return sum(entry.elements for entry in sums), replicated, len(sums)


@pytest.mark.parametrize("sizes", LAYOUTS[:2], ids=str)
def test_with_sequence_parallelism_megatron_sums_the_replicated_factors_once_a_step(sizes: ParallelSizes) -> None:
    for summed, replicated, calls in run_ranks(sizes.tensor, finalized, sizes, sizes=sizes):
        assert replicated > 0
        assert (summed, calls) == ((replicated, 1) if sizes.sequence_parallel else (0, 0))
