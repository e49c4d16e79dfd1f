"""Which projections a configuration targets: PEFT's matching rules, on Hugging Face and on Megatron names.

The rules are those of PEFT's ``check_target_module_exists`` (0.21): a list entry matches a path that it equals or ends after a
dot; a string is a regular expression for the whole path; exclusion goes first; a layer filter reads the first numbered segment.
Unlike PEFT, a name that matches nothing anywhere is an error.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlora.config import LoraConfig
from mlora.names import EMBEDDING, OUTPUT_LAYER

# Collects a set of names over the pipeline's stages, so that a stage that holds none of them does not call them unknown.
Union = Callable[[set[str]], set[str]]

# "all-linear" leaves the output layer out, and a tied one is no module of its own; to exclude it is right, though idle.
_NEVER_ADAPTED: Mapping[str, set[str]] = {"target_modules": set(), "exclude_modules": {"lm_head", "output_layer"}}


@dataclass(frozen=True, order=True)
class Projection:
    """One matrix that LoRA can adapt: ``part`` of the Megatron linear ``module``.

    In Hugging Face it is a linear of its own or, where that module is fused too, some of the rows of one; then all its parts have
    its name, so that they are targeted together, with one rank and one alpha.
    """

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


def matches_saved(path: str, name: str) -> bool:
    """PEFT's rule for an entry of ``modules_to_save``: the path ends with it, be it within a word ("norm": every norm)."""
    return path.endswith(name)


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
        # The group has a name because the pattern, an expression too, may have groups of its own.
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path):
            return int(found["index"]) if found["index"] else None
    return None


def _in_layers(path: str, config: LoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    if not isinstance(config.target_modules, str) and path in config.target_modules:
        return True  # An entry that spells the whole path is not filtered.
    index = layer_index(path, config.layers_pattern)
    return index is not None and index in ((wanted,) if isinstance(wanted, int) else wanted)


def is_target(projection: Projection, config: LoraConfig) -> bool:
    """Whether the configuration targets the projection: by either of its names, and excludes it by neither."""
    if config.exclude_modules and any(matches(name, config.exclude_modules) for name in projection.names):
        return False
    everything = config.target_modules == "all-linear"
    if everything and projection.module.rpartition(".")[2] in (EMBEDDING, OUTPUT_LAYER):
        return False  # Adapted only where they are named.
    return any(
        (everything or matches(name, config.target_modules)) and _in_layers(name, config) for name in projection.names
    )


def _keys(pattern: Iterable[str], projection: Projection) -> list[str]:
    """The keys that match the projection; the first one holds."""
    return [key for key in pattern if any(matches_pattern_key(name, key) for name in projection.names)]


def select(projections: Sequence[Projection], config: LoraConfig, union: Union = set) -> list[Target]:
    """The targets among this rank's ``projections``.

    Args:
        projections: every projection of this rank's chunks that can be adapted.
        union: joins a set of names over all stages; every stage calls it alike.

    Raises:
        ValueError: if an entry or layer of the configuration matches nothing on any stage, a key of a pattern decides
            nothing, or nothing is left to adapt.
    """
    targets = []
    for projection in projections:
        if not is_target(projection, config):
            continue
        rank_keys, alpha_keys = _keys(config.rank_pattern, projection), _keys(config.alpha_pattern, projection)
        rank = config.rank_pattern[rank_keys[0]] if rank_keys else config.r
        alpha = config.alpha_pattern[alpha_keys[0]] if alpha_keys else config.lora_alpha
        targets.append(Target(projection, rank, alpha))
    existing = union({_generic(name) for projection in projections for name in projection.names})
    _check_names(projections, config, existing, union)
    _check_layers(projections, config, union)
    if not union({target.projection.hf_name for target in targets}):
        raise ValueError(
            f"nothing is left to adapt: target_modules {config.target_modules!r} without exclude_modules "
            f"{config.exclude_modules!r} and outside layers_to_transform {config.layers_to_transform!r} matches no module"
        )
    _check_patterns(targets, config, existing, union)
    return targets


def _check_names(projections: Sequence[Projection], config: LoraConfig, existing: set[str], union: Union) -> None:
    """Every entry of target_modules and exclude_modules matches a module of the model."""
    names = {name for projection in projections for name in projection.names}
    entries = _entries(config)
    matched = {
        entry for entry in entries if any(_entry_matches(name, entry) for name in names | _NEVER_ADAPTED[entry[0]])
    }
    seen = union({f"{field} {entry}" for field, entry, _ in matched})
    for field, entry, is_regex in entries:
        if f"{field} {entry}" not in seen:
            hint = ""
            if is_regex and any(matches_entry(name, entry) for name in existing):
                hint = f" (a string is a regular expression for the whole path; for the name write [{entry!r}])"
            elif not is_regex and re.search(r"[*+?\\|()\[\]^$]", entry):
                hint = " (an entry of a list is a name; a regular expression is given as a string, not in a list)"
            raise ValueError(f"{field}: {entry!r} matches no module on any stage{hint}{_near(entry, existing)}")


def _entries(config: LoraConfig) -> list[tuple[str, str, bool]]:
    """(field, entry, whether it is a regular expression) of the fields that name modules."""
    found = []
    for field, value in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        is_regex = isinstance(value, str)
        found += [(field, str(entry), is_regex) for entry in ([value] if is_regex else value or ())]
    return [entry for entry in found if entry != ("target_modules", "all-linear", True)]


def _entry_matches(path: str, entry: tuple[str, str, bool]) -> bool:
    _, pattern, is_regex = entry
    return matches(path, pattern if is_regex else [pattern])


def _check_layers(projections: Sequence[Projection], config: LoraConfig, union: Union) -> None:
    """Every layer of layers_to_transform exists."""
    wanted = config.layers_to_transform
    if wanted is None:
        return
    found = {layer_index(name, config.layers_pattern) for projection in projections for name in projection.names}
    held = sorted(map(int, union({str(index) for index in found if index is not None})))
    if not held:
        where = f"layers_pattern {config.layers_pattern!r}" if config.layers_pattern else "layers_to_transform"
        raise ValueError(f"{where}: no module's path holds the number of a layer there")
    for layer in (wanted,) if isinstance(wanted, int) else wanted:
        if layer not in held:
            raise ValueError(
                f"layers_to_transform: there is no layer {layer}; the model has layers {held[0]} to {held[-1]}"
            )


def _check_patterns(targets: Sequence[Target], config: LoraConfig, existing: set[str], union: Union) -> None:
    """Every key of rank_pattern and alpha_pattern decides the rank or alpha of a target."""
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        keys = [_keys(pattern, target.projection) for target in targets]
        deciding = union({found[0] for found in keys if found})
        shadowed = union({key for found in keys for key in found[1:]})
        for key in pattern:
            if key in deciding:
                continue
            if key in shadowed:
                raise ValueError(
                    f"{field}: {key!r} decides nothing, for keys before it match all of its modules and the first that "
                    "matches holds; put it before them"
                )
            raise ValueError(f"{field}: {key!r} matches no target on any stage{_near(key, existing)}")


def _generic(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _near(entry: str, existing: set[str]) -> str:
    """What is spelt like the last part of ``entry``, and all there is."""
    leaves = sorted({name.rpartition(".")[2] for name in existing})
    near = difflib.get_close_matches(entry.rpartition(".")[2], leaves, n=3)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    return f"{hint} Modules that can be adapted: {', '.join(sorted(existing))}"
