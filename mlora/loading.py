"""Filling a model chunk from a Hugging Face directory: each parameter from the slices of it that this rank holds."""

import torch

from mlora.families import Architecture, Family
from mlora.spec import fused_norm
from mlora.weights import Weights
from parallel import shards
from parallel.layout import LinearLayout, read_layout
from parallel.norm import HeadsRMSNorm
from parallel.stages import named_modules


@torch.no_grad()
def load_chunk(chunk: torch.nn.Module, family: Family, architecture: Architecture, weights: Weights) -> None:
    """Fill every parameter of a chunk; values are rounded to the parameter's dtype.

    Raises:
        ValueError: a module of the chunk is none of the family's.
    """
    for name, module in named_modules(chunk):
        held = dict(module.named_parameters(recurse=False))
        if not held:
            continue
        if name in ("embedding.word_embeddings", "output_layer"):
            source = "embedding.word_embeddings" if architecture.tied else name
            _load_vocabulary(module, held["weight"], f"{family.hf_name(source)}.weight", weights)
        elif layout := read_layout(name, module):
            _load_linear(layout, held, family, architecture, weights)
        else:
            first = module.first if isinstance(module, HeadsRMSNorm) else 0
            for leaf, parameter in held.items():
                parameter.copy_(weights.read(f"{family.hf_name(name)}.{leaf}", first, parameter.shape[0]))


def _load_linear(
    layout: LinearLayout,
    held: dict[str, torch.nn.Parameter],
    family: Family,
    architecture: Architecture,
    weights: Weights,
) -> None:
    names = {part: family.hf_name(layout.name, part) for part, _ in layout.parts}
    starts = {part: family.rows(architecture, layout.name, part)[0] for part in names}

    def weight(part: str, first: int, count: int, column: int, columns: int) -> torch.Tensor:
        return weights.read(f"{names[part]}.weight", starts[part] + first, count, column, columns)

    def bias(part: str, first: int, count: int) -> torch.Tensor:
        name = f"{names[part]}.bias"
        # Megatron gives a bias to all linears or to none.
        return weights.read(name, starts[part] + first, count) if name in weights.shapes else torch.zeros(count)

    if type(held["weight"]) is torch.nn.Parameter:
        shards.cut(layout, weight, held["weight"])
    else:  # Quantized: its rows cannot be written to one by one.
        whole = torch.empty(held["weight"].shape, dtype=held["weight"].dtype, device=held["weight"].device)
        shards.cut(layout, weight, whole)
        held["weight"].copy_(whole)
    if "bias" in held:
        shards.cut_bias(layout, bias, held["bias"])
    if "layer_norm_weight" in held:
        layer, norm = fused_norm(layout.name)
        held["layer_norm_weight"].copy_(
            weights.read(f"{family.hf_name(f'{layer}.{norm}')}.weight", 0, layout.in_features)
        )


def _load_vocabulary(module: torch.nn.Module, weight: torch.nn.Parameter, name: str, weights: Weights) -> None:
    """Fill this rank's rows of an embedding or output layer; rows beyond the vocabulary are zero."""
    rows = weight.shape[0]
    group = module.tp_group
    first = group.rank() * rows  # type: ignore[union-attr,operator]
    real = min(max(weights.shapes[name][0] - first, 0), rows)
    weight[real:].zero_()
    if real:
        weight[:real].copy_(weights.read(name, first, real, 0, weight.shape[1]))
