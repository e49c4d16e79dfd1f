"""Norms of an adapter against the whole matrices of one process, at every layout, and on every rank alike."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.attach import linear_adapters
from mlora.bank import AdapterBank
from mlora.embedding import EmbeddingLora
from mlora.names import SHARED
from mlora.norms import Norms, adapter_norms
from parallel import shards
from parallel.ledger import Ledger
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests import gpt
from tests.ranks import run_ranks

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS, rank_pattern={"k_proj": 5}),
    "shared A": LoraConfig(r=3, target_modules="all-linear", shared_A=True),
    "dora": LoraConfig(r=2, target_modules=LINEARS, use_dora=True),
    "ends": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "pissa": LoraConfig(r=2, lora_alpha=3, target_modules=LINEARS, init_lora_weights="pissa"),
}
LAYOUTS = {
    "TP4, fewer query groups than ranks": (4, ParallelSizes(tensor=4), {"num_query_groups": 2}),
    "TP2xPP2, sequence parallel": (4, ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), {}),
    "PP2xVPP2, DP2": (4, ParallelSizes(pipeline=2, virtual_pipeline=2), {}),
}
Found = dict[str, dict[str, dict[str, float]]]


def _adapted(sizes: ParallelSizes, config: LoraConfig, changes: dict[str, Any]) -> list[torch.nn.Module]:
    chunks: list[torch.nn.Module] = list(gpt.build(sizes, **changes))
    mlora.apply(chunks, config)
    for adapter in linear_adapters(chunks):
        for factor in adapter.factors():
            factor.parameter.data.add_(gpt.piece(gpt.values(factor.name, *factor.shape), factor))
    return chunks


def found_at(rank: int, sizes: ParallelSizes, changes: dict[str, Any]) -> Found:
    return {
        name: {key: asdict(norms) for key, norms in adapter_norms(_adapted(sizes, config, changes)).items()}
        for name, config in CONFIGS.items()
    }


def expected(rank: int, changes: dict[str, Any]) -> Found:
    """From whole matrices, the product formed."""
    result: Found = {}
    for name, config in CONFIGS.items():
        (chunk,) = _adapted(ParallelSizes(), config, changes)
        result[name] = {}
        for _, module in named_modules(chunk):
            bank = getattr(module, "lora", None)
            if not isinstance(bank, AdapterBank):
                continue
            adapter: Any = bank.adapter("default")
            is_embedding = isinstance(module, EmbeddingLora)
            weight: Any = module.weight.T if is_embedding else module.weight  # type: ignore[operator]
            delta = adapter.delta().T if is_embedding else adapter.delta()
            for part in adapter.parts:
                A, B = adapter.lora_A[SHARED if adapter.shares_A else part], adapter.lora_B[part]
                W = shards.join([adapter.layout], [weight], part)
                matrices = {"A": A, "B": B, "BA": delta[adapter.layout.output_index(part)], "W": W}
                result[name][adapter.hf_names[part]] = {key: float(matrix.norm()) for key, matrix in matrices.items()}
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_those_of_the_whole_matrices(layout: str) -> None:
    size, sizes, changes = LAYOUTS[layout]
    (wanted,) = run_ranks(1, expected, changes)
    ranks = run_ranks(size, found_at, sizes, changes, sizes=sizes)
    assert all(found == ranks[0] for found in ranks)
    for name, norms in wanted.items():
        assert ranks[0][name].keys() == norms.keys()
        assert len(norms) == {"shared A": 7 * gpt.LAYERS, "ends": gpt.LAYERS + 2}.get(name, 6 * gpt.LAYERS)
        for projection, values in norms.items():
            assert ranks[0][name][projection] == pytest.approx(values, rel=1e-10), (name, projection)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"} <= ranks[0]["lora"].keys()


def states(rank: int) -> dict[str, Any]:
    chunks: list[torch.nn.Module] = list(gpt.build(ParallelSizes(tensor=2)))
    mlora.apply(chunks, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    fresh = adapter_norms(chunks)
    gpt.fill_adapter(chunks)
    with Ledger() as ledger:
        trained = adapter_norms(chunks)
    mlora.merge_adapter(chunks)
    merged = adapter_norms(chunks)
    mlora.unmerge_adapter(chunks)
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        adapter_norms(chunks, "other")
    return {
        "fresh": fresh,
        "trained": trained,
        "merged": merged,
        "sent": len(ledger.entries),
    }


def test_new_trained_and_merged_adapters_and_what_is_sent() -> None:
    one, other = run_ranks(2, states)
    assert one == other
    assert all(norms.B == norms.BA == 0 and norms.A > 0 and norms.W > 0 for norms in one["fresh"].values())
    assert all(norms.BA > 0 for norms in one["trained"].values())
    for name, norms in one["merged"].items():
        assert asdict(norms) == pytest.approx(asdict(one["trained"][name]), rel=1e-12)
    assert one["sent"] == 2 * gpt.LAYERS  # one for each adapted linear


def test_parts_of_one_module_have_names_of_their_own() -> None:
    assert run_ranks(1, parts_of_one_module) == [
        {f"model.layers.{layer}.self_attn.qkv_proj.{part}" for layer in range(2) for part in "qkv"}
    ]


def parts_of_one_module(rank: int) -> set[str]:
    from mlora.families import find_family

    chunks: list[torch.nn.Module] = list(gpt.build(ParallelSizes(), num_layers=2))
    family = find_family({"model_type": "phi3"}, "config.json")
    mlora.apply(chunks, LoraConfig(r=2, target_modules=["qkv_proj"]), family=family)
    norms: dict[str, Norms] = adapter_norms(chunks)
    return set(norms)
