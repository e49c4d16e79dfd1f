"""Weights streamed from a live model: those of the exported PEFT directory, of a merge in place and of the merge tool."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  # Imported once here, not in every forked rank.
from safetensors.torch import load_file

import mlora
from mlora import LoraConfig
from mlora.attach import banks
from mlora.checkpoint import save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.merge import merge
from mlora.export import export_peft
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.streaming import iter_adapter_tensors, iter_merged_tensors, peft_config
from parallel.ledger import Entry, Ledger
from parallel.pieces import BUCKET_BYTES
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks
from tests.tiny import write_model

SMALL = 6000  # bytes: several tensors, but not all of a stage
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An adapter on a model of a kind, in a precision."""

    kind: str
    config: LoraConfig
    dtype: torch.dtype = torch.float32


CASES = {
    "lora": Case("llama-all-bias", LoraConfig(r=3, lora_alpha=5, rank_pattern={"k_proj": 2})),
    "some": Case("qwen3", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 3])),
    "dora": Case("qwen2", LoraConfig(r=3, use_dora=True, use_rslora=True)),
    "fused": Case("phi3", LoraConfig(r=3, target_modules=["qkv_proj", "o_proj"]), torch.bfloat16),
    "tied": Case("gemma2", LoraConfig(r=2, shared_A=True)),
    "norms": Case("olmo2", LoraConfig(r=2, lora_alpha=3, adapter_dtype=torch.float32), torch.bfloat16),
    "pissa": Case(
        "mistral", LoraConfig(r=2, init_lora_weights="pissa", target_modules=["k_proj", "up_proj", "lm_head"])
    ),
    "ends": Case("qwen2", LoraConfig(r=3, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "whole": Case(
        "llama", LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])
    ),
    "both": Case(
        "qwen3",
        LoraConfig(r=2, target_modules=["v_proj", "lm_head"], use_dora=True, modules_to_save=["embed_tokens"]),
    ),
}
LAYOUTS = {
    "TP1": (1, ParallelSizes(), ("lora", "pissa", "ends", "whole")),
    "TP2+SP": (2, ParallelSizes(tensor=2, sequence_parallel=True), tuple(CASES)),
    "PP2xVPP2": (2, ParallelSizes(pipeline=2, virtual_pipeline=2), ("some", "dora", "tied")),
    "TP2xPP2": (4, ParallelSizes(tensor=2, pipeline=2), ("lora", "dora", "fused", "tied", "ends", "whole", "both")),
    "TP4": (4, ParallelSizes(tensor=4), ("lora", "norms")),  # of two query groups
    "DP2": (2, ParallelSizes(), ("some",)),
}
PAIRS = [(layout, case) for layout, (_, _, cases) in LAYOUTS.items() for case in cases]


@dataclass
class Streamed:
    """What a rank got of a case, in buckets of two sizes; the collectives of each; whether the base was let alone."""

    adapter: Tensors
    config: dict[str, Any]
    changed: Tensors
    whole: Tensors
    in_place: Tensors
    entries: dict[str, list[Entry]]
    untouched: bool


def taken(stream: Any, name: str, entries: dict[str, list[Entry]]) -> Tensors:
    """A stream's tensors, copied as a consumer would who writes into them afterwards."""
    found = {}
    with Ledger() as ledger:
        for key, tensor in stream:
            assert key not in found
            found[key] = tensor.clone()
            tensor.fill_(torch.nan)
    entries[name] = ledger.entries
    return found


def stream_all(rank: int, folder: Path, names: Sequence[str], sizes: ParallelSizes) -> dict[str, Streamed]:
    """Every case's streams on this rank."""
    found = {}
    for name in names:
        case = CASES[name]
        base = Pretrained.open(folder / name)
        chunks = build_model(base, sizes, dtype=case.dtype)
        mlora.apply(chunks, case.config, family=base.family)
        gpt.fill_adapter(chunks)
        save_checkpoint(folder / f"{name}-native", chunks, base={"path": "b"})
        held = [(parameter, parameter._version, parameter.clone()) for c in chunks for parameter in c.parameters()]
        entries: dict[str, list[Entry]] = {}
        with mlora.disable_adapter(chunks):  # It need not be on.
            adapter = taken(iter_adapter_tensors(chunks), "adapter", entries)
            again = taken(iter_adapter_tensors(chunks, bucket_bytes=SMALL), "adapter small", entries)
            changed = taken(iter_merged_tensors(chunks), "changed", entries)
            whole = taken(iter_merged_tensors(chunks, base=base, bucket_bytes=SMALL), "whole small", entries)
        assert same(again, adapter)
        untouched = all(p._version == version and torch.equal(p, before) for p, version, before in held)
        mlora.merge_adapter(chunks)
        in_place = taken(iter_merged_tensors(chunks, base=base), "whole", entries)
        mlora.unmerge_adapter(chunks)
        found[name] = Streamed(
            adapter, peft_config(chunks, base_name="b"), changed, whole, in_place, entries, untouched
        )
    return found


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Streamed]], Path]]:
    """Layout -> every rank's streams, and the folder of bases and checkpoints."""
    made = {}
    for layout, (size, sizes, cases) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("streams")
        for name in cases:
            changes = {"vocab_size": 500, **({"num_key_value_heads": 2} if layout == "TP4" else {})}
            write_model(folder / name, CASES[name].kind, dtype=CASES[name].dtype, shard_size="1GB", **changes)
        made[layout] = run_ranks(size, stream_all, folder, cases, sizes, sizes=sizes), folder
    return made


def tensors_of(directory: Path) -> Tensors:
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_the_adapter_is_the_exported_one_on_every_rank(
    streams: dict[str, tuple[list[dict[str, Streamed]], Path]], tmp_path: Path, layout: str, case: str
) -> None:
    ranks, folder = streams[layout]
    config = export_peft(folder / f"{case}-native", tmp_path / "peft", profile="peft")
    for rank in ranks:
        assert same(rank[case].adapter, tensors_of(tmp_path / "peft"))
        assert rank[case].config == config
        assert rank[case].untouched


def check_merged(whole: Tensors, changed: Tensors, by_tool: Tensors, base: Tensors) -> None:
    """``whole`` is what the merge tool makes: where nothing is ``changed`` the base's bits, elsewhere within one rounding."""
    assert whole.keys() == by_tool.keys()
    for key, tensor in whole.items():
        theirs = by_tool[key]
        assert tensor.dtype == theirs.dtype, key
        if key not in changed:
            assert torch.equal(tensor, base[key]), key
            continue
        # The tool's product and sum are one operation, ours two: float32's last bits, before the one rounding of both.
        assert not torch.equal(tensor, base[key]), key
        off = (tensor.double() - theirs.double()).abs()
        if tensor.dtype == torch.float32:
            assert off.max() <= 1e-6 * theirs.abs().max(), key
        else:
            assert (off <= torch.finfo(tensor.dtype).eps * theirs.double().abs()).all(), key
            assert (off > 0).double().mean() < 0.01, key


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_merged_weights_are_those_of_a_merge(
    streams: dict[str, tuple[list[dict[str, Streamed]], Path]], tmp_path: Path, layout: str, case: str
) -> None:
    ranks, folder = streams[layout]
    report = merge(folder / case, [(open_adapter(folder / f"{case}-native"), 1.0)], tmp_path / "merged")
    by_tool, base = tensors_of(tmp_path / "merged"), tensors_of(folder / case)
    for rank in ranks:
        found = rank[case]
        assert same(found.whole, found.in_place)
        assert found.changed.keys() == {f"{name}.weight" for name in report.changed}
        assert all(torch.equal(tensor, found.whole[key]) for key, tensor in found.changed.items())
        check_merged(found.whole, found.changed, by_tool, base)


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_a_bucket_is_one_broadcast_and_one_gather(
    streams: dict[str, tuple[list[dict[str, Streamed]], Path]], layout: str, case: str
) -> None:
    ranks, _ = streams[layout]
    sizes = LAYOUTS[layout][1]
    for rank in ranks:
        found = rank[case]
        for name, tensors, limit in (
            ("adapter", found.adapter, BUCKET_BYTES),
            ("adapter small", found.adapter, SMALL),
            ("changed", found.changed, BUCKET_BYTES),
            ("whole small", found.whole, SMALL),
            ("whole", found.in_place, BUCKET_BYTES),
        ):
            sent = {kind: [e for e in found.entries[name] if e.kind == kind] for kind in ("broadcast", "all_gather")}
            rest = [e for e in found.entries[name] if e.kind not in sent]
            scaled = case == "dora" and sizes.tensor > 1 and name in ("changed", "whole small")
            # DoRA's one number a row, on the stage that has the linear; its hidden size is 32.
            assert [(e.kind, e.shape) for e in rest] == [("all_reduce", (32,))] * (8 // sizes.pipeline if scaled else 0)
            buckets = count_buckets(tensors, limit, sizes)
            total = sum(tensor.nbytes for tensor in tensors.values())
            assert len(sent["broadcast"]) == (buckets if sizes.pipeline > 1 else 0)
            assert len(sent["all_gather"]) == (buckets if sizes.tensor > 1 else 0)
            if sizes.tensor > 1:
                # Pieces of one tensor differ in size: rows of a rank that does not divide, few query groups, the last vocabulary.
                gathered = sum(entry.bytes for entry in sent["all_gather"])
                assert total <= gathered <= (1.3 if layout == "TP4" else 1.06) * total, (name, gathered / total)
            if sizes.pipeline > 1:
                assert sum(e.bytes for e in sent["broadcast"]) == (
                    sum(e.bytes for e in sent["all_gather"]) // sizes.tensor if sizes.tensor > 1 else total
                )


def count_buckets(tensors: Tensors, limit: int, sizes: ParallelSizes) -> int:
    """How many buckets there are when each takes tensors of a stage and a dtype, in their order, while they fit."""
    count, last, held = 0, None, 0
    for key, tensor in tensors.items():
        this = stage_of(key, sizes), tensor.dtype
        if this != last or held + tensor.nbytes > limit:
            count, last, held = count + 1, this, 0
        held += tensor.nbytes
    return count


def stage_of(key: str, sizes: ParallelSizes) -> int:
    """The pipeline stage of a tensor of a model of four layers."""
    if ".layers." not in key:
        return 0 if "embed" in key else sizes.pipeline - 1
    layer = int(key.partition(".layers.")[2].partition(".")[0])
    return layer * sizes.pipeline * (sizes.virtual_pipeline or 1) // 4 % sizes.pipeline


def refusals(rank: int, folder: Path) -> None:
    base = Pretrained.open(folder)
    chunks = build_model(base, ParallelSizes(tensor=2))
    for stream in (iter_adapter_tensors, iter_merged_tensors):
        with pytest.raises(ValueError, match="there is no adapter 'default'; there is none"):
            stream(chunks)
    mlora.apply(chunks, LoraConfig(r=2))
    mlora.apply(chunks, LoraConfig(r=2), "other")
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        iter_adapter_tensors(chunks, bucket_bytes=0)
    mlora.merge_adapter(chunks, "other")
    with pytest.raises(ValueError, match="adapter 'other' is merged"):
        iter_merged_tensors(chunks)
    assert all(bank.merged == "other" for bank in banks(chunks))


def test_what_cannot_be_streamed_is_named(tmp_path: Path) -> None:
    run_ranks(2, refusals, write_model(tmp_path / "base"))


def unknown_on_the_last_stage(rank: int, folder: Path) -> None:
    base = Pretrained.open(folder)
    chunks = build_model(base, ParallelSizes(pipeline=2))
    mlora.apply(chunks, LoraConfig(r=2), family=base.family)
    if rank == 1:
        chunks[0].decoder.layers[0].stray = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="stray"):
        iter_merged_tensors(chunks, base=base)


def test_a_module_that_the_family_has_not_ends_every_stage(tmp_path: Path) -> None:
    run_ranks(2, unknown_on_the_last_stage, write_model(tmp_path / "base"), sizes=ParallelSizes(pipeline=2))
