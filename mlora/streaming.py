"""The weights of a live model under Hugging Face's names, whole and on every rank: for an inference engine beside the trainer.

:func:`iter_adapter_tensors` gives what a PEFT directory of the adapter would hold, :func:`iter_merged_tensors` the weights with the
adapter in them. Both leave the model as it is: a merged weight is computed beside the base's, in float32 and rounded once, when
its bucket is due. What is sent, and when, is said in :mod:`parallel.pieces`.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.attach import banks, check_adapter_exists, linear_adapters
from mlora.bank import AdapterBank
from mlora.checkpoint import adapter_config
from mlora.conversion.peft import PREFIX
from mlora.conversion.portable import plain_config
from mlora.conversion.selection import selection
from mlora.copies import CopiedModule, copied_modules
from mlora.embedding import EmbeddingAdapter
from mlora.hf_pieces import changed_pieces, copy_pieces, module_pieces, rows_of_modules, without_padding
from mlora.names import DEFAULT_ADAPTER, SHARED
from mlora.pretrained import Pretrained
from mlora.switch import check_no_tied_term, merged_adapter
from parallel.pieces import BUCKET_BYTES, Piece, whole_tensors
from parallel.stages import as_chunks, named_modules, union_over_stages
from parallel.together import together

Model = torch.nn.Module | Sequence[torch.nn.Module]


def iter_adapter_tensors(
    model: Model, adapter_name: str = DEFAULT_ADAPTER, *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """(PEFT's key, tensor) of every tensor of an adapter, as trained: what the "peft" profile exports, bit for bit.

    Keys are ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` and so on; :func:`peft_config` says how they are
    meant. Collectives, memory and what every rank must do are those of :func:`parallel.pieces.whole_tensors`.

    Args:
        model: this rank's chunks; the adapter need not be on.
        bucket_bytes: of tensors that are sent together.

    Returns:
        An iterator; what is wrong is raised before its first value.

    Raises:
        ValueError: there is no such adapter on any stage.
    """
    pieces = [piece for adapter in linear_adapters(model, adapter_name) for piece in _adapter_pieces(adapter)]
    for module, copies in copied_modules(model):
        pieces += copy_pieces(module, copies, adapter_name, PREFIX)
    return whole_tensors(pieces, bucket_bytes)


def iter_merged_tensors(
    model: Model,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    base: Pretrained | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face's name, tensor) of the weights with an adapter in them, in the base weights' dtype.

    Without ``base`` only the weights that the adapter changes: all that an engine needs which holds the base, or an earlier state
    of the adapter. With it every weight of the model, as its checkpoint names them. The values are those that
    :func:`mlora.merge_adapter` would put into the model, bit for bit. Collectives, memory and what every rank must do are those of
    :func:`parallel.pieces.whole_tensors`; DoRA adds one number a row of the linears whose columns are divided.

    Args:
        model: this rank's chunks; the adapter need not be on.
        base: the model's directory, of which no weights are read.
        bucket_bytes: of tensors that are sent together.

    Returns:
        An iterator; what is wrong is raised before its first value.

    Raises:
        ValueError: there is no such adapter on any stage, or another one is merged; it adapts a tied embedding; a module is none
            of the family's.
    """
    merged = merged_adapter(model)
    if merged not in (None, adapter_name):
        raise ValueError(f"adapter {merged!r} is merged into the base weights; unmerge it first")
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    check_no_tied_term(model, adapter_name)
    # A module of no family may be on one stage alone.
    pieces = together(lambda: list(_merged_pieces(model, found, adapter_name, base, is_merged=merged is not None)))
    return whole_tensors(pieces, bucket_bytes)


def _merged_pieces(
    model: Model, found: Sequence[AdapterBank], adapter_name: str, base: Pretrained | None, is_merged: bool
) -> Iterator[Piece]:
    everything = [*found, *(copies for _, copies in copied_modules(model))]
    of_adapters = {id(module) for bank in everything for module in bank.modules()}
    for chunk in as_chunks(model):
        for name, module in named_modules(chunk):
            bank = getattr(module, "lora", None)
            adapter = bank.adapter(adapter_name) if isinstance(bank, AdapterBank) else None
            copies = module.copies if isinstance(module, CopiedModule) else None
            if copies is not None and adapter_name in copies.adapters:
                yield from copy_pieces(module, copies, adapter_name)
            elif base is not None and id(module) not in of_adapters:
                yield from module_pieces(name, module, None if is_merged else adapter, base)
            elif base is None and adapter is not None:
                yield from changed_pieces(module, adapter, merged=is_merged)


def peft_config(model: Model, adapter_name: str = DEFAULT_ADAPTER, *, base_name: str | None = None) -> dict[str, Any]:
    """The ``adapter_config.json`` that goes with :func:`iter_adapter_tensors`. A collective of the pipeline group.

    Args:
        base_name: what it calls the base model.

    Raises:
        ValueError: there is no such adapter on any stage.
    """
    rows = {
        json.dumps([adapter.hf_names[part], *_rank_and_alpha(adapter, part)])
        for adapter in linear_adapters(model, adapter_name)
        for part in adapter.parts
    }
    modules = {name: (rank, alpha) for name, rank, alpha in map(json.loads, union_over_stages(rows))}
    config = adapter_config(model, adapter_name)
    layers = getattr(getattr(as_chunks(model)[0], "config", None), "num_layers", None)
    return plain_config(
        base_name,
        use_rslora=config.use_rslora and not config.decomposes,
        use_dora=config.use_dora,
        lora_dropout=config.lora_dropout,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        **selection(modules, layers),
    )


def _rank_and_alpha(adapter: LinearAdapter, part: str) -> tuple[int, float]:
    """As PEFT must be told them; the term of an adapter that started as a part of the weight has twice the rank."""
    config, rank, scaling = adapter.config, adapter.ranks[part], adapter.scaling[part]
    if config.decomposes:
        return 2 * rank, 2 * rank * scaling
    alphas = (config.lora_alpha, *config.alpha_pattern.values())
    return rank, next(alpha for alpha in alphas if config.scaling(rank, alpha) == scaling)


def _adapter_pieces(adapter: LinearAdapter) -> Iterator[Piece]:
    layout, dtype = adapter.layout, adapter.dtype
    totals = rows_of_modules(adapter.rows, adapter.hf_names)
    left, columns = without_padding(*layout.columns, adapter.columns)
    twice = 2 if adapter.config.decomposes else 1
    key, end = ("lora_embedding_", "") if isinstance(adapter, EmbeddingAdapter) else ("lora_", ".weight")
    for part in adapter.parts:
        name, rank = f"{PREFIX}{adapter.hf_names[part]}", twice * adapter.ranks[part]
        first, count = without_padding(*layout.part_rows(part), adapter.rows[part])
        at, rows = adapter.hf_rows[part] + first, totals[adapter.hf_names[part]]
        if adapter.hf_rows[part] == 0 and columns:  # The first of the projections of one module brings their A.
            shape, size = (rank, adapter.columns), (rank, columns)
            make = partial(_A, adapter, SHARED if adapter.shares_A else part, columns)
            yield Piece(f"{name}.{key}A{end}", shape, (0, left), size, dtype, make)
        if not count:
            continue
        make = partial(_B, adapter, part, count)
        yield Piece(f"{name}.{key}B{end}", (rows, rank), (at, 0), (count, rank), dtype, make)
        if adapter.uses_dora:
            make = partial(torch.narrow, adapter.lora_magnitude_vector[part].detach(), 0, 0, count)
            yield Piece(f"{name}.lora_magnitude_vector", (rows,), (at,), (count,), dtype, make)


def _A(adapter: LinearAdapter, key: str, columns: int) -> torch.Tensor:
    A = adapter.lora_A[key]
    return (torch.cat([A, adapter.lora_A0.get_buffer(key)]) if adapter.config.decomposes else A)[:, :columns]


def _B(adapter: LinearAdapter, part: str, rows: int) -> torch.Tensor:
    B = adapter.lora_B[part]
    return (torch.cat([B, -adapter.lora_B0.get_buffer(part)], dim=1) if adapter.config.decomposes else B)[:rows]
