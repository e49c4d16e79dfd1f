"""This rank's pieces of Hugging Face's weights, from the modules of a live model: as they are, or with an adapter in them."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.copies import CopyBank, base_weight
from mlora.dora import scales
from mlora.embedding import EmbeddingAdapter
from mlora.names import EMBEDDING, OUTPUT_LAYER
from mlora.pretrained import Pretrained
from mlora.spec import fused_norm
from mlora.switch import add_weight
from parallel.layout import WHOLE, LinearLayout, read_layout
from parallel.norm import HeadsRMSNorm
from parallel.pieces import Piece


def changed_pieces(module: torch.nn.Module, adapter: LinearAdapter, merged: bool) -> Iterator[Piece]:
    """The weight that an adapter changes."""
    layout, added = adapter.layout, None if merged else adapter
    if layout.name.rpartition(".")[2] in (EMBEDDING, OUTPUT_LAYER):
        size = adapter.columns if isinstance(adapter, EmbeddingAdapter) else adapter.rows[WHOLE]
        yield from _vocabulary_piece(module, added, f"{adapter.hf_names[WHOLE]}.weight", size)
    else:
        rows = {part: adapter.hf_rows[part] for part in adapter.parts}
        yield from _linear_pieces(module, layout, added, adapter.hf_names, rows)


def module_pieces(
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
    totals = rows_of_modules(dict(layout.parts), names)
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
    totals = rows_of_modules(dict(layout.parts), names)
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
    first, real = without_padding(module.tp_group.rank() * rows, rows, vocab_size)
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


def copy_pieces(module: torch.nn.Module, copies: CopyBank, adapter_name: str, prefix: str = "") -> Iterator[Piece]:
    """The weight of a module that trains whole."""
    for factor in copies.factors(adapter_name, module):
        inside = factor.parameter.detach()[factor.inside]
        if inside.numel():
            name, size = f"{prefix}{copies.hf_name}.weight", tuple(inside.shape)
            yield Piece(name, factor.shape, factor.offset, size, inside.dtype, inside.detach)


def rows_of_modules(rows: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Rows of each Hugging Face module that is named, from those of its parts."""
    totals: dict[str, int] = {}
    for part, name in names.items():
        totals[name] = totals.get(name, 0) + rows[part]
    return totals


def without_padding(first: int, count: int, total: int) -> tuple[int, int]:
    """(first, count) of rows or columns without those of the vocabulary's padding."""
    return first, min(max(total - first, 0), count)
