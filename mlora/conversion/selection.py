"""PEFT's configuration of given modules: the shortest fields that target exactly these, with these ranks and these alphas."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from mlora.targets import layer_index

Number = TypeVar("Number", int, float)


def most_common(values: Iterable[Number]) -> Number:
    """The value that occurs most often; the least of several such."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def selection(modules: Mapping[str, tuple[int, float]], layer_count: int | None) -> dict[str, Any]:
    """The fields of an ``adapter_config.json`` that decide which modules are adapted, and their ranks and alphas.

    Args:
        modules: full Hugging Face path -> (rank, alpha).
        layer_count: of the whole model, so that layers need not be listed where all have adapters; None: they are listed.
    """
    ranks = {name: rank for name, (rank, _) in modules.items()}
    alphas = {name: alpha for name, (_, alpha) in modules.items()}
    r, lora_alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, lora_alpha),
        **targets(modules.keys(), layer_count),
    }


def targets(names: Collection[str], layer_count: int | None) -> dict[str, Any]:
    """``target_modules`` and, where not all layers have adapters, ``layers_to_transform``.

    Last parts of the paths if the layers are alike, full paths if they are not; what lies outside of the layers, in full.
    """
    layers = {name: layer_index(name, None) for name in names}
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    inside = {name for name, layer in layers.items() if layer is not None}
    outside = set(names) - inside
    if {in_layer(name, layer) for name in inside for layer in numbers} != inside:
        return {"target_modules": sorted(names)}
    target_modules = sorted({name.rpartition(".")[2] for name in inside} | outside)
    if not numbers or (layer_count is not None and numbers == list(range(layer_count))):
        return {"target_modules": target_modules}
    return {"target_modules": target_modules, "layers_to_transform": numbers}


def in_layer(name: str, layer: int) -> str:
    """The module of the same kind in another layer."""
    return re.sub(r"\.\d+\.", f".{layer}.", name, count=1)


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Expressions for the modules whose value is not the default: last parts of paths where all of one kind agree, else paths."""
    kinds: dict[str, set[Number]] = {}
    for name, value in values.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern = {kind: found.pop() for kind, found in kinds.items() if len(found) == 1}
    whole = {re.escape(name): value for name, value in values.items() if name.rpartition(".")[2] not in pattern}
    return {key: value for key, value in (pattern | whole).items() if value != default}
