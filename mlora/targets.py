"""Which projections a configuration targets: PEFT's matching rules, on Hugging Face and on Megatron names.

The rules are those of PEFT's ``check_target_module_exists`` (0.21): a list entry matches a path that it equals or ends after a
dot; a string is a regular expression for the whole path; exclusion goes first; a layer filter reads the first numbered segment.
Unlike PEFT, a name that matches nothing anywhere is an error.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlora.config import LoraConfig

# Collects a set of names over the pipeline's stages, so that a stage that holds none of them does not call them unknown.
Union = Callable[[set[str]], set[str]]


@dataclass(frozen=True, order=True)
class Projection:
    """One matrix that LoRA can adapt: ``part`` of the Megatron linear ``module``, a linear of its own in Hugging Face."""

    module: str
    part: str
    hf_name: str

    @property
    def names(self) -> tuple[str, str]:
        """The paths that patterns are matched with."""
        return self.hf_name, self.module


@dataclass(frozen=True)
class Target:
    """A projection that gets an adapter, with its rank and alpha."""

    projection: Projection
    rank: int
    alpha: float


def matches_entry(path: str, entry: str) -> bool:
    """PEFT's rule for one entry of a list."""
    return path == entry or path.endswith("." + entry)


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """PEFT's rule for a list of names or a regular expression."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(matches_entry(path, entry) for entry in patterns)


def matches_pattern_key(path: str, key: str) -> bool:
    """PEFT's rule for a key of ``rank_pattern`` and ``alpha_pattern``."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def layer_index(path: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer that ``path`` lies in, by PEFT's rule; None outside of the layers."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(found.group(1)) if found else None
    for pattern in patterns:
        if found := re.match(rf".*\.{pattern}\.(\d+)\.", path):
            return int(found.group(1))
    return None


def _in_layers(path: str, config: LoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    if not isinstance(config.target_modules, str) and path in config.target_modules:
        return True  # An entry that spells the whole path is not filtered.
    index = layer_index(path, config.layers_pattern)
    return index is not None and index in ((wanted,) if isinstance(wanted, int) else wanted)


def _is_target(path: str, config: LoraConfig) -> bool:
    named = config.target_modules == "all-linear" or matches(path, config.target_modules)
    return named and _in_layers(path, config)


def _first(pattern: Iterable[str], projection: Projection) -> str | None:
    return next((key for key in pattern if any(matches_pattern_key(name, key) for name in projection.names)), None)


def select(projections: Sequence[Projection], config: LoraConfig, union: Union = set) -> list[Target]:
    """The targets among this rank's ``projections``.

    Args:
        projections: every projection of this rank's chunks that can be adapted.
        union: joins a set of names over all stages; every stage calls it alike.

    Raises:
        ValueError: if an entry, pattern or layer of the configuration matches nothing on any stage, or nothing is left.
    """
    targets = []
    for projection in projections:
        excluded = config.exclude_modules and any(matches(name, config.exclude_modules) for name in projection.names)
        if excluded or not any(_is_target(name, config) for name in projection.names):
            continue
        rank_key, alpha_key = _first(config.rank_pattern, projection), _first(config.alpha_pattern, projection)
        rank = config.r if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        targets.append(Target(projection, rank, alpha))
    _check_everything_matched(projections, targets, config, union)
    return targets


def _check_everything_matched(
    projections: Sequence[Projection], targets: Sequence[Target], config: LoraConfig, union: Union
) -> None:
    names = {name for projection in projections for name in projection.names}
    used: set[str] = set()
    for kind, entries, rule in _entries(config):
        used |= {f"{kind} {entry}" for entry in entries if any(rule(name, entry) for name in names)}
    used |= {
        f"layer {index}" for index in (layer_index(name, config.layers_pattern) for name in names) if index is not None
    }
    seen = union(used)
    existing = union({_generic(name) for name in names})
    matched = union({target.projection.hf_name for target in targets})
    for kind, entries, _ in _entries(config):
        for entry in entries:
            if f"{kind} {entry}" not in seen:
                raise ValueError(_nothing_matches(kind, entry, existing))
    layers = config.layers_to_transform
    for layer in () if layers is None else (layers,) if isinstance(layers, int) else layers:
        if f"layer {layer}" not in seen:
            held = sorted(int(name.removeprefix("layer ")) for name in seen if name.startswith("layer "))
            raise ValueError(f"layers_to_transform: there is no layer {layer}; the model has layers {_span(held)}")
    if not matched:
        raise ValueError(
            f"nothing is left to adapt: target_modules {config.target_modules!r} without exclude_modules "
            f"{config.exclude_modules!r} and outside layers_to_transform {config.layers_to_transform!r} matches no module"
        )


def _entries(config: LoraConfig) -> list[tuple[str, list[str], Callable[[str, str], bool]]]:
    """(field, its entries, the rule by which an entry matches a path) for each field that names modules."""
    found: list[tuple[str, list[str], Callable[[str, str], bool]]] = []
    for kind, value in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(value, str):
            if value != "all-linear":
                found.append((kind, [value], lambda path, entry: re.fullmatch(entry, path) is not None))
        elif value:
            found.append((kind, list(value), matches_entry))
    found.append(("rank_pattern", list(config.rank_pattern), matches_pattern_key))
    found.append(("alpha_pattern", list(config.alpha_pattern), matches_pattern_key))
    return found


def _generic(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _nothing_matches(kind: str, entry: str, existing: set[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in existing})
    near = difflib.get_close_matches(entry.rpartition(".")[2], leaves, n=3)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return f"{kind}: {entry!r} matches no module on any stage{hint} Modules that can be adapted: {', '.join(sorted(existing))}"


def _span(indices: Sequence[int]) -> str:
    return f"{indices[0]} to {indices[-1]}" if indices else "without numbers"
