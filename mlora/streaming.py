"""The weights of a live model under Hugging Face's names, whole and on every rank: for an inference engine beside the trainer.

:func:`iter_adapter_tensors` gives what a PEFT directory of the adapter would hold, :func:`iter_merged_tensors` the weights with the
adapter in them. Both leave the model as it is: a merged weight is computed beside the base's, in float32 and rounded once, when
its bucket is due. What is sent, and when, is said in :mod:`parallel.pieces`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.attach import banks, check_adapter_exists, linear_adapters
from mlora.bank import AdapterBank
from mlora.checkpoint import adapter_config
from mlora.conversion.peft import PREFIX
from mlora.conversion.portable import plain_config
from mlora.conversion.selection import selection
from mlora.copies import CopiedModule, CopyBank, base_weight, copied_modules
from mlora.dora import scales
from mlora.embedding import EmbeddingAdapter
from mlora.names import DEFAULT_ADAPTER, EMBEDDING, OUTPUT_LAYER, SHARED
from mlora.pretrained import Pretrained
from mlora.spec import fused_norm
from mlora.switch import add_weight, check_no_tied_term, merged_adapter
from parallel.layout import WHOLE, LinearLayout, read_layout
from parallel.norm import HeadsRMSNorm
from parallel.pieces import BUCKET_BYTES, Piece, whole_tensors
from parallel.stages import as_chunks, named_modules, union_over_stages

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
        pieces += _copy_pieces(module, copies, adapter_name, PREFIX)
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
    everything = [*found, *(copies for _, copies in copied_modules(model))]
    of_adapters = {id(module) for bank in everything for module in bank.modules()}
    pieces: list[Piece] = []
    for chunk in as_chunks(model):
        for name, module in named_modules(chunk):
            bank = getattr(module, "lora", None)
            adapter = bank.adapter(adapter_name) if isinstance(bank, AdapterBank) else None
            copies = module.copies if isinstance(module, CopiedModule) else None
            if copies is not None and adapter_name in copies.adapters:
                pieces += _copy_pieces(module, copies, adapter_name)
            elif base is not None and id(module) not in of_adapters:
                pieces += _module_pieces(name, module, None if merged else adapter, base)
            elif base is None and adapter is not None:
                pieces += _changed_pieces(module, adapter, merged=merged is not None)
    return whole_tensors(pieces, bucket_bytes)


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
    totals = _rows_of_modules(adapter.rows, adapter.hf_names)
    left, columns = _real(*layout.columns, adapter.columns)
    twice = 2 if adapter.config.decomposes else 1
    key, end = ("lora_embedding_", "") if isinstance(adapter, EmbeddingAdapter) else ("lora_", ".weight")
    for part in adapter.parts:
        name, rank = f"{PREFIX}{adapter.hf_names[part]}", twice * adapter.ranks[part]
        first, count = _real(*layout.part_rows(part), adapter.rows[part])
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


def _real(first: int, count: int, total: int) -> tuple[int, int]:
    """(first, count) of rows or columns without those of the vocabulary's padding."""
    return first, min(max(total - first, 0), count)


def _copy_pieces(module: torch.nn.Module, copies: CopyBank, adapter_name: str, prefix: str = "") -> Iterator[Piece]:
    """The weight of a module that trains whole."""
    for factor in copies.factors(adapter_name, module):
        inside = factor.parameter.detach()[factor.inside]
        if inside.numel():
            name, size = f"{prefix}{copies.hf_name}.weight", tuple(inside.shape)
            yield Piece(name, factor.shape, factor.offset, size, inside.dtype, inside.detach)


def _rows_of_modules(rows: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Rows of each Hugging Face module that is named, from those of its parts."""
    totals: dict[str, int] = {}
    for part, name in names.items():
        totals[name] = totals.get(name, 0) + rows[part]
    return totals


def _A(adapter: LinearAdapter, key: str, columns: int) -> torch.Tensor:
    A = adapter.lora_A[key]
    return (torch.cat([A, adapter.lora_A0.get_buffer(key)]) if adapter.config.decomposes else A)[:, :columns]


def _B(adapter: LinearAdapter, part: str, rows: int) -> torch.Tensor:
    B = adapter.lora_B[part]
    return (torch.cat([B, -adapter.lora_B0.get_buffer(part)], dim=1) if adapter.config.decomposes else B)[:rows]


def _changed_pieces(module: torch.nn.Module, adapter: LinearAdapter, merged: bool) -> Iterator[Piece]:
    """The weight that an adapter changes."""
    layout, added = adapter.layout, None if merged else adapter
    if layout.name.rpartition(".")[2] in (EMBEDDING, OUTPUT_LAYER):
        size = adapter.columns if isinstance(adapter, EmbeddingAdapter) else adapter.rows[WHOLE]
        yield from _vocabulary_piece(module, added, f"{adapter.hf_names[WHOLE]}.weight", size)
    else:
        rows = {part: adapter.hf_rows[part] for part in adapter.parts}
        yield from _linear_pieces(module, layout, added, adapter.hf_names, rows)


def _module_pieces(
    name: str, module: torch.nn.Module, adapter: LinearAdapter | None, base: Pretrained
) -> Iterator[Piece]:
    """Every parameter of a module that Hugging Face's checkpoint has."""
    held = dict(module.named_parameters(recurse=False))
    if not held:
        return
    family, architecture = base.family, base.architecture
    if name in ("embedding.word_embeddings", "output_layer"):
        if name == "embedding.word_embeddings" or not architecture.tied:
            yield from _vocabulary_piece(module, adapter, f"{family.hf_name(name)}.weight", architecture.vocab_size)
    elif layout := read_layout(name, module):
        names = {part: family.hf_name(name, part) for part, _ in layout.parts}
        rows = {part: family.rows(architecture, name, part)[0] for part in names}
        yield from _linear_pieces(module, layout, adapter, names, rows)
        if "bias" in held and name.rpartition(".")[2] in architecture.biased:
            yield from _bias_pieces(held["bias"], layout, names, rows)
        if "layer_norm_weight" in held:
            layer, norm = fused_norm(name)
            yield _whole_piece(f"{family.hf_name(f'{layer}.{norm}')}.weight", held["layer_norm_weight"])
    else:
        for leaf, parameter in held.items():
            yield from _norm_piece(module, f"{family.hf_name(name)}.{leaf}", parameter)


def _linear_pieces(
    module: torch.nn.Module,
    layout: LinearLayout,
    adapter: LinearAdapter | None,
    names: Mapping[str, str],
    rows: Mapping[str, int],
) -> Iterator[Piece]:
    """The weight of each projection, with its adapter if there is one; ``rows`` says where it begins in its module."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    totals = _rows_of_modules(dict(layout.parts), names)
    row_scales = cache(partial(_row_scales, adapter, weight))
    for part, name in names.items():
        first, count = layout.part_rows(part)
        if count:
            yield Piece(
                f"{name}.weight",
                (totals[name], layout.in_features),
                (rows[part] + first, layout.columns[0]),
                (count, layout.columns[1]),
                weight.dtype,
                partial(_merged_rows, weight, layout, part, adapter, row_scales),
            )


def _row_scales(adapter: LinearAdapter | None, weight: torch.Tensor) -> torch.Tensor | None:
    """DoRA's factor of each row [out_l], once for a linear, as it is a collective of its group; None without DoRA."""
    return scales(adapter, weight) if adapter is not None and adapter.uses_dora else None


def _merged_rows(
    weight: torch.Tensor,
    layout: LinearLayout,
    part: str,
    adapter: LinearAdapter | None,
    row_scales: Callable[[], torch.Tensor | None],
) -> torch.Tensor:
    """This rank's rows of a projection's weight [rows, in_l], rounded once to its dtype."""
    held = weight.detach() if type(weight) is torch.nn.Parameter else weight.detach().float()  # Quantized.
    index = layout.output_index(part).to(weight.device)
    rows = held[index] if len(layout.parts) > 1 else held
    scale = row_scales()
    if adapter is None or part not in adapter.lora_B:
        return rows.to(weight.dtype)
    total = add_weight(adapter.delta_of(part), rows, None if scale is None else scale[index])
    return total.to(weight.dtype)


def _bias_pieces(
    bias: torch.Tensor, layout: LinearLayout, names: Mapping[str, str], rows: Mapping[str, int]
) -> Iterator[Piece]:
    totals = _rows_of_modules(dict(layout.parts), names)
    for part, name in names.items():
        first, count = layout.part_rows(part)
        if count:
            index = layout.output_index(part).to(bias.device)
            make = partial(torch.index_select, bias.detach(), 0, index)
            yield Piece(f"{name}.bias", (totals[name],), (rows[part] + first,), (count,), bias.dtype, make)


def _vocabulary_piece(module: Any, adapter: LinearAdapter | None, name: str, vocab_size: int) -> Iterator[Piece]:
    """This rank's rows of an embedding or output layer, with the adapter if there is one, without those beyond the vocabulary."""
    weight = base_weight(module).detach()
    rows, columns = weight.shape
    first, real = _real(module.tp_group.rank() * rows, rows, vocab_size)
    if real:
        make = partial(_merged_vocabulary, weight, adapter, real)
        yield Piece(name, (vocab_size, columns), (first, 0), (real, columns), weight.dtype, make)


def _merged_vocabulary(weight: torch.Tensor, adapter: LinearAdapter | None, rows: int) -> torch.Tensor:
    if adapter is None:
        return weight[:rows]
    scale = _row_scales(adapter, weight)
    return add_weight(adapter.delta(), weight, scale)[:rows].to(weight.dtype)


def _norm_piece(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> Iterator[Piece]:
    if not isinstance(module, HeadsRMSNorm):
        yield _whole_piece(name, parameter)
        return
    count = parameter.shape[0]
    yield Piece(name, (module.features,), (module.first,), (count,), parameter.dtype, parameter.detach)


def _whole_piece(name: str, parameter: torch.Tensor) -> Piece:
    shape = tuple(parameter.shape)
    return Piece(name, shape, (0,) * len(shape), shape, parameter.dtype, parameter.detach)
