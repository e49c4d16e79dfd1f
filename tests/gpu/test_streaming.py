"""Weights streamed from Transformer Engine's layers: those of the exported adapter, of a merge in place and of the merge tool.

In bfloat16 a base weight is a view into a buffer that holds an adapter's B behind each row: none of that may come along.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.adapter import LinearAdapter
from mlora.checkpoint import save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.merge import merge
from mlora.export import export_peft
from mlora.log_probs import log_probs
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.streaming import iter_adapter_tensors, iter_merged_tensors, peft_config
from mlora.te import TeLora
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests import gpt
from tests.mlora.test_saved import micro_batches
from tests.mlora.test_streaming import SMALL, Tensors, check_merged, same, taken, tensors_of
from tests.tiny import write_model

TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}


@dataclass(frozen=True)
class Case:
    """An adapter on a model of a kind, in a precision; ``fused`` if its weights are views once the model has run."""

    kind: str
    config: LoraConfig
    dtype: torch.dtype = torch.bfloat16
    fused: bool = True


CASES = {
    "float32": Case("llama-all-bias", LoraConfig(r=5, rank_pattern={"k_proj": 2}), torch.float32, fused=False),
    "bfloat16": Case("llama-all-bias", LoraConfig(r=5)),
    "some": Case("qwen3", LoraConfig(r=5, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 3])),
    "shared": Case("phi3", LoraConfig(r=5, target_modules=["qkv_proj", "o_proj"])),
    "tied": Case("qwen2-tied", LoraConfig(r=5, shared_A=True)),
    "float32 adapter": Case("olmo2", LoraConfig(r=5, lora_alpha=3, adapter_dtype=torch.float32), fused=False),
    "dora": Case("qwen2", LoraConfig(r=5, use_dora=True, use_rslora=True), torch.float32, fused=False),
    "ends": Case("llama", LoraConfig(r=5, target_modules=["q_proj", "embed_tokens", "lm_head"])),
}


@dataclass
class Streamed:
    """What a model gives before it has run, after that, and with the adapter merged."""

    adapter: Tensors
    config: dict[str, Any]
    fresh: Tensors
    changed: Tensors
    whole: Tensors
    in_place: Tensors
    again: Tensors


def on_the_cpu(tensors: Tensors) -> Tensors:
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def run(chunks: list[Any]) -> None:
    """Whereupon the weights are views, if they are to be."""
    log_probs(chunks, micro_batches())


def weights(chunks: list[Any]) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}


def stream_all(folder: Path, name: str) -> Streamed:
    """A case's streams; the base is let alone, and its weights stay where they are."""
    case, base = CASES[name], Pretrained.open(folder / name)
    chunks = build_model(base, ParallelSizes(), dtype=case.dtype, **TE)
    mlora.apply(chunks, case.config, family=base.family)
    gpt.fill_adapter(chunks)
    save_checkpoint(folder / f"{name}-native", chunks, base={"path": "b"})
    before = weights(chunks)
    ledgers: dict[str, Any] = {}
    fresh = taken(iter_merged_tensors(chunks, base=base), "fresh", ledgers)
    run(chunks)
    views = {module.lora.packed is not None for _, module in named_modules(chunks[0]) if isinstance(module, TeLora)}
    assert views == {case.fused}
    places = [parameter.data_ptr() for parameter in chunks[0].parameters()]
    with mlora.disable_adapter(chunks):  # It need not be on.
        adapter = taken(iter_adapter_tensors(chunks, bucket_bytes=SMALL), "adapter", ledgers)
        changed = taken(iter_merged_tensors(chunks), "changed", ledgers)
    whole = taken(iter_merged_tensors(chunks, base=base, bucket_bytes=SMALL), "whole", ledgers)
    assert same(weights(chunks), before)
    mlora.merge_adapter(chunks)
    in_place = taken(iter_merged_tensors(chunks, base=base), "in place", ledgers)
    mlora.unmerge_adapter(chunks)
    run(chunks)
    again = taken(iter_merged_tensors(chunks, base=base), "again", ledgers)
    assert same(weights(chunks), before)
    assert [parameter.data_ptr() for parameter in chunks[0].parameters()] == places
    tensors = map(on_the_cpu, (fresh, changed, whole, in_place, again))
    return Streamed(on_the_cpu(adapter), peft_config(chunks, base_name="b"), *tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bases and checkpoints by case."""
    made = tmp_path_factory.mktemp("streams")
    for name, case in CASES.items():
        write_model(made / name, case.kind, dtype=case.dtype, shard_size="1GB")
    return made


@pytest.mark.parametrize("name", CASES)
def test_streams_are_the_export_and_the_merge(folder: Path, tmp_path: Path, name: str) -> None:
    case, found = CASES[name], stream_all(folder, name)
    config = export_peft(folder / f"{name}-native", tmp_path / "peft", profile="peft")
    assert same(found.adapter, tensors_of(tmp_path / "peft")) and found.config == config
    assert same(found.whole, found.fresh) and same(found.whole, found.in_place) and same(found.whole, found.again)
    report = merge(folder / name, [(open_adapter(folder / f"{name}-native"), 1.0)], tmp_path / "merged")
    by_tool, base = tensors_of(tmp_path / "merged"), tensors_of(folder / name)
    assert found.changed.keys() == {f"{key}.weight" for key in report.changed}
    assert all(torch.equal(tensor, found.whole[key]) for key, tensor in found.changed.items())
    assert all(tensor.dtype == case.dtype for tensor in found.whole.values())
    check_merged(found.whole, found.changed, by_tool, base)


def test_off_a_quantized_base_the_numbers_stream_that_it_stands_for(folder: Path) -> None:
    """With the adapter in them, rounded once from float32."""
    base = Pretrained.open(folder / "ends")
    overrides = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}
    chunks = build_model(base, ParallelSizes(), dtype=torch.bfloat16, **overrides, **TE)
    mlora.apply(chunks, LoraConfig(r=5, target_modules=["o_proj", "down_proj"]), family=base.family)
    gpt.fill_adapter(chunks)
    run(chunks)
    streams: dict[str, Any] = {}
    changed = taken(iter_merged_tensors(chunks), "changed", streams)
    whole = taken(iter_merged_tensors(chunks, base=base), "whole", streams)
    assert len(changed) == 8 and all(torch.equal(whole[key], tensor) for key, tensor in changed.items())
    checked = 0
    for name, module in named_modules(chunks[0]):
        if not isinstance(module, TeLora):
            continue
        (hf_name,) = set(module.lora.adapters["default"].hf_names.values())
        adapter = module.lora.adapters["default"]
        assert isinstance(adapter, LinearAdapter) and type(module.weight) is not torch.nn.Parameter
        expected = (adapter.delta() + module.weight.detach().float()).bfloat16()
        assert torch.equal(whole[f"{hf_name}.weight"], expected), name
        checked += 1
    assert checked == 8
    files = tensors_of(folder / "ends")
    for key, tensor in whole.items():
        if key in changed:
            continue
        theirs = files[key].double()
        quantized = ".layers." in key and "norm" not in key
        error = float((tensor.cpu().double() - theirs).norm() / theirs.norm())
        assert (1e-3 < error < 0.05) if quantized else error == 0, key
