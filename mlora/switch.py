"""Which adapter is on: switching between named adapters, turning them off, and merging one into the base weights and back.

None of it copies the base, moves a parameter or touches a gradient buffer; merging alone writes to the base's weights.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from mlora.adapter import LinearAdapter
from mlora.attach import banks, check_adapter_exists, freeze_all_but
from mlora.bank import AdapterBank, Bank
from mlora.copies import base_weight, copied_modules
from mlora.dora import scales
from mlora.embedding import EmbeddingAdapter
from mlora.names import DEFAULT_ADAPTER, EMBEDDING
from parallel.stages import as_chunks, union_over_stages

logger = logging.getLogger(__name__)

Model = torch.nn.Module | Sequence[torch.nn.Module]
Pairs = Sequence[tuple[torch.Tensor, AdapterBank]]


def set_adapter(model: Model, adapter_name: str, inference_mode: bool = False) -> None:
    """Make ``adapter_name`` the one that forward adds and that trains; the others are kept, frozen and off.

    Megatron's DDP and optimizer hold the parameters that were trainable when they were made: to train another adapter, make them
    anew (a warning says so).

    A collective of the pipeline group, as are merging and unmerging.

    Args:
        inference_mode: PEFT's word for an adapter that is on and frozen, such as a reference; for a while only, use
            :func:`use_adapter`.

    Raises:
        ValueError: there is no such adapter on any stage, or one is merged.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    _check_not_merged(found)
    everything = list(_all_banks(model))
    for bank in everything:
        bank.active = adapter_name
        freeze_all_but(bank, None if inference_mode else adapter_name)
    in_buffers = {hasattr(parameter, "main_grad") for bank in everything for parameter in bank.parameters()}
    trained = [parameter for bank in everything for parameter in bank.parameters() if parameter.requires_grad]
    if True in in_buffers and not all(hasattr(parameter, "main_grad") for parameter in trained):
        logger.warning("adapter %r is on, but DDP was made without it: it gets no gradient there", adapter_name)


@contextlib.contextmanager
def use_adapter(model: Model, adapter_name: str) -> Iterator[None]:
    """Another adapter, frozen as it is, while the context lasts, whatever ends it: a reference beside the one that trains.

    What trains stays what it was: no parameter's ``requires_grad`` changes. A merged adapter is taken out for as long.

    Raises:
        ValueError: there is no such adapter on any stage.
    """
    check_adapter_exists(list(banks(model)), adapter_name)
    with _only(model, adapter_name):
        yield


@contextlib.contextmanager
def disable_adapter(model: Model) -> Iterator[None]:
    """The base model alone while the context lasts, whatever ends it: no adapter is added, and a merged one is taken out."""
    with _only(model, None):
        yield


@contextlib.contextmanager
def _only(model: Model, adapter_name: str | None) -> Iterator[None]:
    pairs, everything = list(_pairs(model)), list(_all_banks(model))
    before = [(bank, bank.active) for bank in everything]
    merged = next((bank.merged for _, bank in pairs if bank.merged is not None), None)
    row_scales = [bank.scale_of_merge for _, bank in pairs]
    # No collective here: what ends the context on one rank may not end it on another.
    _unmerge(pairs)
    try:
        for bank in everything:
            bank.active = adapter_name
        yield
    finally:
        left = {name for bank in everything for name in bank.adapters}  # Some may have been deleted meanwhile.
        for bank, active in before:
            bank.active = active if active in left else None
        if merged in left:
            _unmerge(pairs)
            _merge(pairs, merged, row_scales)


def delete_adapter(model: Model, adapter_name: str) -> None:
    """Take an adapter off the model for good; its name is free again. If it was on, none is on afterwards.

    The base and the other adapters are not touched, and the parameters' memory is freed with the last reference to them. A
    collective of the pipeline group.

    Raises:
        ValueError: there is no such adapter on any stage; it is merged; or it is being trained, and Megatron's DDP and optimizer
            hold it: set another adapter first.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    _check_not_merged(found)
    everything = list(_all_banks(model))
    trained = any(
        parameter.requires_grad and hasattr(parameter, "main_grad")
        for bank in everything
        for parameter in bank.parameters_of(adapter_name)
    )
    if union_over_stages({adapter_name} if trained else set()):
        raise ValueError(
            f"adapter {adapter_name!r} is being trained: DDP's gradient buffers and the optimizer hold it; set another one first"
        )
    for bank in everything:
        bank.delete(adapter_name)


def adapter_names(model: Model) -> list[str]:
    """The names of all adapters, sorted. A collective of the pipeline group."""
    return sorted(union_over_stages({name for bank in banks(model) for name in bank.adapters}))


def merge_adapter(model: Model, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Put ``σ B A``, and DoRA's scale of the rows, into the base weights: in float32, rounded once to the weight's dtype.

    The weights as they were are kept in host memory, so that :func:`unmerge_adapter` brings back the same bits.

    Modules that train whole (``modules_to_save``) stay what the adapter that is on has them to be.

    Raises:
        ValueError: there is no such adapter on any stage, one is merged already, or a weight is quantized; the adapter trains
            modules whole and is not on; it adapts a tied embedding, whose weight is the output layer's too.
    """
    pairs = list(_pairs(model))
    found = [bank for _, bank in pairs]
    check_adapter_exists(found, adapter_name)
    _check_not_merged(found)
    quantized = union_over_stages(
        {bank.layout.name for weight, bank in pairs if type(weight) is not torch.nn.Parameter}
    )
    if quantized:
        raise ValueError(
            f"{min(quantized)} has a quantized weight, which would round most of an adapter away: merge into the checkpoint that "
            f"it was made of"
        )
    _check_mergeable(model, adapter_name)
    _merge(pairs, adapter_name, [_scale(weight, bank.adapter(adapter_name)) for weight, bank in pairs])


def unmerge_adapter(model: Model) -> None:
    """Take a merged adapter out again: the base weights are bit for bit what they were.

    Raises:
        ValueError: none is merged.
    """
    pairs = list(_pairs(model))
    if not _merged([bank for _, bank in pairs]):
        raise ValueError("no adapter is merged")
    _unmerge(pairs)


def add_weight(delta: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """``delta + W``, each row times DoRA's ``scale``: what a merge rounds to the weight's dtype; ``delta`` is consumed.

    Args:
        delta: float32 or float64 [rows, in_l].
        weight: [rows, in_l], left as it is.
        scale: [rows].
    """
    total = delta.to(torch.promote_types(delta.dtype, weight.dtype)).add_(weight)
    return total if scale is None else total.mul_(scale[:, None])


@torch.no_grad()
def _scale(weight: torch.Tensor, adapter: LinearAdapter | None) -> torch.Tensor | None:
    """DoRA's factor of each row [out_l], a collective; None without DoRA."""
    return scales(adapter, weight) if adapter is not None and adapter.uses_dora else None


@torch.no_grad()
def _merge(pairs: Pairs, adapter_name: str, row_scales: Sequence[torch.Tensor | None]) -> None:
    try:
        for (weight, bank), scale in zip(pairs, row_scales, strict=True):
            bank.merged, bank.scale_of_merge = adapter_name, scale
            adapter = bank.adapter(adapter_name)
            if adapter is not None:
                kept = weight.detach().to("cpu", copy=True)
                total = add_weight(adapter.delta(), weight, scale)
                bank.weight_before_merge = kept
                weight.copy_(total)
    except BaseException:
        _unmerge(pairs)  # Out of memory, say: all or nothing.
        raise


@torch.no_grad()
def _unmerge(pairs: Pairs) -> None:
    for weight, bank in pairs:
        if bank.weight_before_merge is not None:
            weight.copy_(bank.weight_before_merge)
        bank.weight_before_merge, bank.scale_of_merge, bank.merged = None, None, None


def merged_adapter(model: Model) -> str | None:
    """The name of the adapter that is in the base weights now, on every stage alike; None for none."""
    return next(iter(_merged(list(banks(model)))), None)


def _pairs(model: Model) -> Iterator[tuple[torch.Tensor, AdapterBank]]:
    """(weight, bank) of every adapted linear on this rank."""
    for chunk in as_chunks(model):
        for module in chunk.modules():
            bank = getattr(module, "lora", None)
            if isinstance(bank, AdapterBank):
                yield base_weight(module), bank


def _all_banks(model: Model) -> Iterator[Bank]:
    """Those of linears and those of modules that train whole."""
    yield from banks(model)
    for _, copies in copied_modules(model):
        yield copies


def _check_mergeable(model: Model, adapter_name: str) -> None:
    problems = {
        f"adapter {adapter_name!r} trains {bank.hf_name} whole: put it on with set_adapter() first"
        for _, bank in copied_modules(model)
        if adapter_name in bank.adapters and bank.active != adapter_name
    }
    if found := sorted(union_over_stages(problems)):
        raise ValueError(found[0])
    check_no_tied_term(model, adapter_name)


def check_no_tied_term(model: Model, adapter_name: str) -> None:
    """Raises ValueError, on every stage alike, for an adapter of a tied embedding: merged, it would be the output layer's too."""
    tied = [chunk for chunk in as_chunks(model) if getattr(chunk, "share_embeddings_and_output_weights", False)]
    held = {bank.layout.name for bank in banks(tied) if isinstance(bank.adapter(adapter_name), EmbeddingAdapter)}
    held |= {
        copies.name
        for _, copies in copied_modules(tied)
        if copies.name.endswith(EMBEDDING) and adapter_name in copies.adapters
    }
    if found := sorted(union_over_stages(held)):
        raise ValueError(f"{found[0]} is tied to the output layer, which keeps the base's weight: it cannot be merged")


def _merged(found: Sequence[AdapterBank]) -> set[str]:
    """The adapter that is merged, if any, on every stage alike."""
    return union_over_stages({bank.merged for bank in found if bank.merged is not None})


def _check_not_merged(found: Sequence[AdapterBank]) -> None:
    if names := _merged(found):
        raise ValueError(f"adapter {', '.join(map(repr, names))} is merged into the base weights; unmerge it first")
