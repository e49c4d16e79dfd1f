"""Which adapter is on: switching between named adapters, turning them off, and merging one into the base weights and back."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from mlora.adapter import AdapterBank
from mlora.attach import DEFAULT_ADAPTER, banks, check_adapter_exists, freeze_all_but
from parallel.stages import as_chunks

Model = torch.nn.Module | Sequence[torch.nn.Module]


def set_adapter(model: Model, adapter_name: str) -> None:
    """Make ``adapter_name`` the one that forward adds and that trains; the others are kept, frozen and off.

    Switching does not touch the base or move memory. A gradient buffer made before (Megatron's DDP) holds the parameters
    that were trainable when it was made.

    Raises:
        ValueError: there is no such adapter on any stage, or one is merged.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    _check_not_merged(found)
    for bank in found:
        bank.active = adapter_name
        freeze_all_but(bank, adapter_name)


@contextlib.contextmanager
def disable_adapter(model: Model) -> Iterator[None]:
    """The base model alone while the context lasts, whatever ends it: no adapter is added, and a merged one is taken out."""
    found = list(banks(model))
    merged = next((bank.merged for bank in found if bank.merged is not None), None)
    active = [bank.active for bank in found]
    if merged is not None:
        unmerge_adapter(model)
    try:
        for bank in found:
            bank.active = None
        yield
    finally:
        for bank, name in zip(found, active, strict=True):
            bank.active = name
        if merged is not None:
            merge_adapter(model, merged)


@torch.no_grad()
def merge_adapter(model: Model, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Put ``σ B A`` into the base weights: summed in float32, rounded once to the weight's dtype. Needs no communication.

    The weights as they were are kept in host memory, so that :func:`unmerge_adapter` brings back the same bits.

    Raises:
        ValueError: there is no such adapter, or one is merged already.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    _check_not_merged(found)
    for weight, bank in _weights(model):
        adapter = bank.adapter(adapter_name)
        if adapter is not None:
            bank.weight_before_merge = weight.detach().to("cpu", copy=True)
            delta = adapter.delta()
            weight.copy_(weight.to(delta.dtype) + delta)
        bank.merged = adapter_name


@torch.no_grad()
def unmerge_adapter(model: Model) -> None:
    """Take a merged adapter out again: the base weights are bit for bit what they were.

    Raises:
        ValueError: none is merged.
    """
    pairs = list(_weights(model))
    if pairs and all(bank.merged is None for _, bank in pairs):
        raise ValueError("no adapter is merged")
    for weight, bank in pairs:
        if bank.weight_before_merge is not None:
            weight.copy_(bank.weight_before_merge)
        bank.weight_before_merge, bank.merged = None, None


def _weights(model: Model) -> Iterator[tuple[torch.Tensor, AdapterBank]]:
    for chunk in as_chunks(model):
        for module in chunk.modules():
            bank = getattr(module, "lora", None)
            if isinstance(bank, AdapterBank):
                yield module.weight, bank  # type: ignore[misc]


def _check_not_merged(found: Sequence[AdapterBank]) -> None:
    merged = next((bank.merged for bank in found if bank.merged is not None), None)
    if merged is not None:
        raise ValueError(f"adapter {merged!r} is merged into the base weights; unmerge it first")
