"""Model chunks of a pipeline stage, and names that are the same on every stage: layers are numbered over the whole model."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import BaseTransformerLayer


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside Megatron's wrappers (DDP, Float16Module), which hold it as ``.module``."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    return chunk


def as_chunks(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The unwrapped chunks of this rank, from a module, a list of them, or either wrapped."""
    wrapped = [model] if isinstance(model, torch.nn.Module) else list(model)
    return [unwrap(chunk) for chunk in wrapped]


def named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """``chunk.named_modules()`` with global layer numbers.

    A Megatron layer knows its number over all stages and virtual stages (``layer_number``, from 1); its place in the
    chunk's ``ModuleList`` is local. ``decoder.layers.0`` of the second of two stages of two layers is ``decoder.layers.2``.
    """
    renamed: list[tuple[str, str]] = []
    for name, module in chunk.named_modules():
        while renamed and not name.startswith(renamed[-1][0] + "."):
            renamed.pop()
        global_name = renamed[-1][1] + name[len(renamed[-1][0]) :] if renamed else name
        if isinstance(module, BaseTransformerLayer) and name.rpartition(".")[2].isdigit():
            global_name = f"{global_name.rpartition('.')[0]}.{int(module.layer_number) - 1}"
            renamed.append((name, global_name))
        yield global_name, module


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``chunk.named_parameters()`` with global layer numbers, shared parameters once."""
    seen: set[int] = set()
    for name, module in named_modules(chunk):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{leaf}" if name else leaf, parameter


def union_over_stages(values: set[str]) -> set[str]:
    """The union of a set of names over the pipeline's stages. A collective of the pipeline group."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return set(values)
    gathered: list[set[str] | None] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, values, group=group)
    return set().union(*(part for part in gathered if part is not None))
