"""Activations that backward computes again: the same run, bit for bit, as with all of them kept."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP

from mlora import LoraConfig
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks
from tests.tiny import LAYERS, write_model
from tests.training import LAYOUTS, Case, Layout, Share, adapt, errors, join, train

ADAPTERS = {
    "everywhere": Case(lora=LoraConfig(r=5, init_lora_weights=False, lora_dropout=0.2), packed=True, steps=2),
    # Nothing in front of the last MLP has anything to train, so nothing there asks for a gradient; a stage has no adapter.
    "late": Case(
        lora=LoraConfig(
            r=2,
            init_lora_weights=False,
            lora_dropout=0.1,
            use_dora=True,
            target_modules=["up_proj", "down_proj"],
            layers_to_transform=[3],
        ),
        steps=2,
    ),
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
# Way -> (overrides of Megatron's configuration, what runs twice). "layernorm" needs Transformer Engine.
WAYS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "uniform": (FULL | {"recompute_method": "uniform"}, {"DotProductAttention", "MLP"}),
    "block": (FULL | {"recompute_method": "block"}, {"DotProductAttention", "MLP"}),
    "core_attn": (SELECTIVE | {"recompute_modules": ["core_attn"]}, {"DotProductAttention"}),
    "mlp": (SELECTIVE | {"recompute_modules": ["mlp"]}, {"MLP"}),
    "core_attn and mlp": (SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]}, {"DotProductAttention", "MLP"}),
    "distributed": (
        FULL | {"recompute_method": "uniform", "distribute_saved_activations": True},
        {"DotProductAttention", "MLP"},
    ),
}
Runs = Callable[[str], list[dict[tuple[str, str], tuple[Share, Counter[str]]]]]


def ways(sizes: ParallelSizes) -> list[str]:
    """With sequence parallelism Megatron refuses to distribute activations, which are divided already."""
    return [way for way in WAYS if way != "distributed" or not sizes.sequence_parallel]


def train_all_ways(rank: int, path: Path, layout: Layout) -> dict[tuple[str, str], tuple[Share, Counter[str]]]:
    """(adapter, way) -> (this rank's share of the run, how often each kind of module ran forward in it)."""
    found = {}
    for adapter, case in ADAPTERS.items():
        for way in ["kept", *ways(layout.sizes)]:
            overrides = WAYS[way][0] if way in WAYS else {}
            chunks = adapt(path, replace(case, overrides=overrides), layout.sizes)
            counts = watch(chunks)
            found[adapter, way] = train(chunks, case, layout), counts
    return found


def watch(chunks: Sequence[torch.nn.Module]) -> Counter[str]:
    """Counts how often each kind of module runs forward in training."""
    counts: Counter[str] = Counter()

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        counts[type(module).__name__] += module.training

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DotProductAttention | MLP):
                module.register_forward_hook(count)
    return counts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Name of a layout -> every rank's runs. Each layout runs once."""
    path = write_model(tmp_path_factory.mktemp("models") / "llama")

    @functools.cache
    def run(name: str) -> Any:
        layout = LAYOUTS[name]
        return run_ranks(layout.world, train_all_ways, path, layout, sizes=layout.sizes)

    return run


def share_recomputed(way: str, sizes: ParallelSizes) -> float:
    """Of the layers."""
    return sizes.pipeline * (sizes.virtual_pipeline or 1) / LAYERS if way == "block" else 1.0


@pytest.mark.parametrize(
    ("layout", "adapter", "way"),
    [
        (layout, adapter, way)
        for layout in ("TP1", "PP2", "PP2xVPP2", "TP2", "TP2+SP")
        for adapter in ADAPTERS
        for way in ways(LAYOUTS[layout].sizes)
    ],
)
def test_recomputation_changes_no_bit(runs: Runs, layout: str, adapter: str, way: str) -> None:
    ranks, sizes = runs(layout), LAYOUTS[layout].sizes
    kept = join([rank[adapter, "kept"][0] for rank in ranks])
    assert set(errors(join([rank[adapter, way][0] for rank in ranks]), kept).values()) == {0.0}
    assert all(norm > 0.01 for norm in kept.norms)
    for rank in ranks:
        before, after = rank[adapter, "kept"][1], rank[adapter, way][1]
        twice = 1 + share_recomputed(way, sizes)
        assert after == {kind: count * (twice if kind in WAYS[way][1] else 1) for kind, count in before.items()}
