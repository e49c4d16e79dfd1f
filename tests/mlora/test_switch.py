"""Adapters switched, turned off and merged, against models that never had them."""

import logging
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

import mlora
from mlora import LoraConfig
from mlora.adapter import LinearAdapter
from mlora.attach import banks
from mlora.bank import AdapterBank
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests import gpt
from tests.ranks import run_ranks

ONE, TP2, SP2 = ParallelSizes(), ParallelSizes(tensor=2), ParallelSizes(tensor=2, sequence_parallel=True)
PP2, VPP2 = ParallelSizes(pipeline=2), ParallelSizes(pipeline=2, virtual_pipeline=2)
LAYOUTS = [(1, ONE), (2, TP2), (2, SP2), (4, ParallelSizes(tensor=4))]
WIDE = LoraConfig(r=5, lora_alpha=7, rank_pattern={"k_proj": 2})
NARROW = LoraConfig(
    r=2,
    lora_alpha=3,
    target_modules=["v_proj", "linear_fc2"],
    layers_to_transform=[0, 1],
    shared_A=True,
    use_dora=True,
    init_lora_weights="olora",
)


def model(sizes: ParallelSizes, *adapters: tuple[str, LoraConfig], **changes: Any) -> list[Any]:
    """Chunks in evaluation mode with filled adapters; the first is on."""
    chunks = gpt.build(sizes, **changes)
    for name, config in adapters:
        mlora.apply(chunks, config, name)
        gpt.fill_adapter(chunks, name)
    for chunk in chunks:
        chunk.eval()
    return chunks


@torch.no_grad()
def output(chunks: list[Any]) -> torch.Tensor:
    """Logits of this rank's part of the vocabulary; with pipeline stages the loss, on every rank."""
    if chunks[0].pre_process and chunks[0].post_process:
        logits: torch.Tensor = chunks[0](
            gpt.micro_batch(1)["tokens"], torch.arange(gpt.LENGTH).expand(gpt.ROWS, -1), None
        )
        return logits
    loss = torch.tensor(gpt.run(chunks, forward_only=True))
    torch.distributed.all_reduce(loss)
    return loss


def weights(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for chunk in chunks for key, value in chunk.state_dict().items() if value is not None}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def switching(rank: int, sizes: ParallelSizes) -> None:
    both = model(sizes, ("wide", WIDE), ("narrow", NARROW))
    alone = {"wide": output(model(sizes, ("wide", WIDE))), "narrow": output(model(sizes, ("narrow", NARROW)))}
    base = output(model(sizes))
    assert relative(alone["wide"], base) > 1e-3 and relative(alone["narrow"], base) > 1e-3
    for name in ("wide", "narrow", "narrow", "wide"):
        mlora.set_adapter(both, name)
        assert torch.equal(output(both), alone[name]), name
        trained = {name for bank in banks(both) for name, adapter in bank.adapters.items() if adapter_trains(adapter)}
        assert trained == {name}
        assert not any(p.requires_grad for key, p in both[0].named_parameters() if ".lora." not in key)
    with pytest.raises(ValueError, match="no adapter 'broad'; there is narrow, wide"):
        mlora.set_adapter(both, "broad")
    assert torch.equal(output(both), alone["wide"])


def adapter_trains(adapter: torch.nn.Module) -> bool:
    flags = {parameter.requires_grad for parameter in adapter.parameters()}
    assert len(flags) == 1
    return flags.pop()


@pytest.mark.parametrize(("size", "sizes"), LAYOUTS[:3])
def test_each_adapter_is_as_if_it_were_alone(size: int, sizes: ParallelSizes) -> None:
    run_ranks(size, switching, sizes, sizes=sizes)


def turning_off(rank: int, sizes: ParallelSizes, merged: str | None) -> None:
    base = output(model(sizes))
    chunks = model(sizes, ("default", WIDE), ("narrow", NARROW))
    before = weights(chunks)
    if merged is not None:
        mlora.set_adapter(chunks, merged)
        mlora.merge_adapter(chunks, merged)
    on, held = output(chunks), weights(chunks)
    assert relative(on, base) > 1e-3
    with mlora.disable_adapter(chunks):
        assert torch.equal(output(chunks), base) and same(weights(chunks), before)
        with mlora.disable_adapter(chunks):
            assert torch.equal(output(chunks), base)
        assert torch.equal(output(chunks), base)
    assert torch.equal(output(chunks), on) and same(weights(chunks), held)
    with pytest.raises(KeyError, match="mine"), mlora.disable_adapter(chunks):
        with pytest.raises(ZeroDivisionError), mlora.disable_adapter(chunks):
            raise ZeroDivisionError
        assert torch.equal(output(chunks), base)
        raise KeyError("mine")
    assert torch.equal(output(chunks), on) and same(weights(chunks), held)


@pytest.mark.parametrize("merged", [None, "default", "narrow"])
@pytest.mark.parametrize(("size", "sizes"), [*LAYOUTS[:3], (2, PP2), (2, VPP2)])
def test_off_is_the_base_and_on_again_whatever_ends_it(size: int, sizes: ParallelSizes, merged: bool) -> None:
    run_ranks(size, turning_off, sizes, merged, sizes=sizes)


def off_on_one_stage(rank: int) -> None:
    """One stage has nothing to turn off, and only one of the ranks leaves by an error."""
    chunks = model(PP2, ("default", NARROW))
    assert bool(list(banks(chunks))) == (rank == 0)
    mlora.merge_adapter(chunks)
    held = weights(chunks)
    try:
        with mlora.disable_adapter(chunks):
            if rank == 0:
                raise KeyError
    except KeyError:
        pass
    assert same(weights(chunks), held)
    mlora.unmerge_adapter(chunks)
    for wrong in (mlora.unmerge_adapter, lambda model: mlora.set_adapter(model, "other")):
        with pytest.raises(ValueError):
            wrong(chunks)
    mlora.merge_adapter(chunks)
    with pytest.raises(ValueError, match="adapter 'default' is merged"):
        mlora.set_adapter(chunks, "default")


def test_a_stage_without_adapters_takes_part() -> None:
    run_ranks(2, off_on_one_stage, sizes=PP2)


def merging(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    chunks = model(sizes, ("default", WIDE), ("narrow", NARROW))
    before, on = weights(chunks), output(chunks)
    mlora.merge_adapter(chunks)
    error = relative(output(chunks), on)
    assert not same(weights(chunks), before)
    merged = weights(chunks)
    for refused in (mlora.merge_adapter, lambda model: mlora.merge_adapter(model, "narrow")):
        with pytest.raises(ValueError, match="adapter 'default' is merged into the base weights; unmerge it first"):
            refused(chunks)
    assert same(weights(chunks), merged)
    mlora.unmerge_adapter(chunks)
    assert same(weights(chunks), before) and torch.equal(output(chunks), on)
    with pytest.raises(ValueError, match="no adapter is merged"):
        mlora.unmerge_adapter(chunks)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        mlora.merge_adapter(chunks, "other")
    mlora.set_adapter(chunks, "narrow")
    on = output(chunks)
    mlora.merge_adapter(chunks, "narrow")
    return {"wide": error, "narrow": relative(output(chunks), on)}


@pytest.mark.parametrize(("size", "sizes"), [*LAYOUTS, (2, VPP2)])
def test_merged_is_the_adapter_and_unmerged_the_same_bits(size: int, sizes: ParallelSizes) -> None:
    for errors in run_ranks(size, merging, sizes, sizes=sizes):
        assert max(errors.values()) < 1e-12, errors


PRECISIONS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float32),
]


def merged_weights(
    rank: int, sizes: ParallelSizes, base: torch.dtype, adapter: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(merged weights, what they must be: one rounding of W + σ B A) of this rank's linears by name."""
    config = LoraConfig(r=3, lora_alpha=2, adapter_dtype=adapter)
    chunks = model(sizes, ("default", config), params_dtype=base, pipeline_dtype=base, bf16=base == torch.bfloat16)
    before = weights(chunks)
    expected = {}
    for name, module in named_modules(chunks[0]):
        if isinstance(bank := getattr(module, "lora", None), AdapterBank):
            held, layout = bank.adapters["default"], bank.layout
            assert isinstance(held, LinearAdapter)
            whole = module.weight.detach().to(torch.float64, copy=True)
            product = torch.zeros_like(whole)
            for part, B in held.lora_B.items():
                # In float64 from what the parameters hold, by the definition.
                product[layout.output_index(part)] = 2 / 3 * B.detach().double() @ held.lora_A[part].detach().double()
            delta = held.delta().double()
            assert (delta - product).abs().max() < 1e-6 * product.abs().max()
            # A float64 weight must not lose a bit to the float32 of what is added to it.
            expected[name] = whole + (delta if base == torch.float64 else product)
    mlora.merge_adapter(chunks)
    merged = {name: dict(named_modules(chunks[0]))[name].weight.detach().clone() for name in expected}  # type: ignore[union-attr]
    mlora.unmerge_adapter(chunks)
    assert same(weights(chunks), before)
    return merged, expected


@pytest.mark.parametrize(("base", "adapter"), PRECISIONS)
@pytest.mark.parametrize(("size", "sizes"), LAYOUTS[:2])
def test_a_merge_rounds_once(size: int, sizes: ParallelSizes, base: torch.dtype, adapter: torch.dtype) -> None:
    for merged, expected in run_ranks(size, merged_weights, sizes, base, adapter, sizes=sizes):
        assert len(merged) == 16
        for name, weight in merged.items():
            assert weight.dtype == base
            # Half a unit in the last place of the weight, and float32's error of the sum.
            limit = expected[name].abs() * torch.finfo(base).eps / 2 + 1e-6 * (base != torch.float64)
            assert ((weight.double() - expected[name]).abs() <= limit).all(), name


def half_merged(rank: int) -> None:
    chunks = model(ONE, ("default", WIDE))
    before, on = weights(chunks), output(chunks)
    last = list(banks(chunks))[-1].adapters["default"]

    def fails() -> torch.Tensor:
        raise MemoryError("no memory left")

    last.delta = fails  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        mlora.merge_adapter(chunks)
    assert same(weights(chunks), before) and torch.equal(output(chunks), on)
    assert all(bank.merged is None for bank in banks(chunks))


def test_a_merge_that_fails_leaves_the_model_as_it_was() -> None:
    run_ranks(1, half_merged)


def warned(rank: int) -> list[str]:
    """Warnings of switching to the adapter that DDP was made with, and to another."""
    chunks = model(ONE, ("wide", WIDE), ("narrow", NARROW), params_dtype=torch.float32)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mlora.switch").addHandler(handler)
    mlora.set_adapter(chunks, "narrow")
    mlora.set_adapter(chunks, "wide")
    assert records == []
    DistributedDataParallel(chunks[0].config, DistributedDataParallelConfig(), module=chunks[0])
    mlora.set_adapter(chunks, "wide")
    assert records == []
    mlora.set_adapter(chunks, "narrow")
    return records


def test_an_adapter_that_ddp_does_not_hold_is_warned_of() -> None:
    assert run_ranks(1, warned) == [["adapter 'narrow' is on, but DDP was made without it: it gets no gradient there"]]
