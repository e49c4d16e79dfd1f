"""How Megatron-Bridge and mcore-bridge name the matrices of their adapters, and which keys of a checkpoint belong together."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlora.conversion.megatron_files import MegatronFiles
from mlora.conversion.megatron_settings import ARGS_FILE, RUN_FILE, Settings, bridge_settings, swift_settings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a library lays out its adapters.

    Attributes:
        name: of the library.
        marks: stand in the keys of A and of B.
        key: the whole of a matrix's key, with groups ``layer``, ``module``, ``part``, ``adapter`` and ``factor``.
        lora_A: what ``factor`` is for A.
        settings: reads how the adapter was trained.
        settings_file: that it looks for first.
        fc1_by_rank: the rows of B of ``linear_fc1`` are in the order of the ranks, each with its gate and up.
        whole: the key of a weight that trains whole, with groups ``module`` and ``adapter``; None if there are none.
    """

    name: str
    marks: tuple[str, str]
    key: re.Pattern[str]
    lora_A: str
    settings: Callable[[Path], Settings | None]
    settings_file: str
    fc1_by_rank: bool
    whole: re.Pattern[str] | None = None


_MODULE = (
    r"(?:decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<module>(?:self_attention|mlp)\.\w+)|(?P<output>output_layer))\."
)
LAYOUTS: Mapping[str, Layout] = {
    "megatron-bridge": Layout(
        name="Megatron-Bridge",
        marks=(".linear_in.", ".linear_out."),
        key=re.compile(
            _MODULE
            + r"(?P<adapter>adapter)\.(?:adapter_(?P<part>q|k|v|gate|up)\.)?(?P<factor>linear_in|linear_out)\.weight"
        ),
        lora_A="linear_in",
        settings=bridge_settings,
        settings_file=RUN_FILE,
        fc1_by_rank=False,
    ),
    "mcore-bridge": Layout(
        name="mcore-bridge",
        marks=(".lora_A.", ".lora_B."),
        key=re.compile(_MODULE + r"lora_(?P<factor>[AB])\.(?P<adapter>\w+)\.weight(?P<part>)"),
        lora_A="A",
        settings=swift_settings,
        settings_file=ARGS_FILE,
        fc1_by_rank=True,
        whole=re.compile(
            r"(?P<module>embedding\.word_embeddings|output_layer|decoder\.final_layernorm)"
            r"\.modules_to_save\.(?P<adapter>\w+)\.weight"
        ),
    ),
}
# What may stand in the key of something else.
_UNSUPPORTED = {
    "expert": "adapters of experts",
    ".router.": "adapters of routers",
    "weight_magnitude": "the magnitudes of DoRA",
    "lora_embedding_": "adapters of embeddings",
    "modules_to_save": "whole parameters (modules_to_save)",
    "vision_model.": "adapters of vision towers",
    "visual.": "adapters of vision towers",
}


@dataclass(frozen=True)
class Place:
    """Where a matrix stands in the files: a key and, if all layers are in one tensor, the layer."""

    key: str
    layer: int | None


@dataclass(frozen=True)
class Pair:
    """A and B of a Megatron linear, by its full name, or of one part of a fused one."""

    module: str
    part: str | None
    A: Place
    B: Place


def detect(files: MegatronFiles) -> Layout:
    """The layout of a checkpoint.

    Raises:
        ValueError: it has no matrix of an adapter.
    """
    for layout in LAYOUTS.values():
        if any(mark in key for key in files.tensors for mark in layout.marks):
            return layout
    names = " or ".join(layout.name for layout in LAYOUTS.values())
    example = f"; it holds {next(iter(files.tensors))}" if files.tensors else ", and no tensors at all"
    raise ValueError(f"{files.folder} holds no matrix of an adapter of {names}{example}")


def pairs(files: MegatronFiles, layout: Layout, layer_count: int) -> Iterator[Pair]:
    """Every A with its B.

    Args:
        layer_count: of the base model.

    Raises:
        ValueError: a tensor is of something else, of another number of layers, twice there or alone; file and key are named.
    """
    places: dict[tuple[str, str | None], dict[str, Place]] = {}
    adapter = None
    for key in files.tensors:
        if layout.whole is not None and layout.whole.fullmatch(key):
            continue
        found = _match(files, layout, key)
        if adapter not in (None, found["adapter"]):
            raise files.error(key, f"there are several adapters, {adapter} and {found['adapter']}")
        adapter = found["adapter"]
        factor = "A" if found["factor"] == layout.lora_A else "B"
        for module, place in _places(files, key, found, layer_count):
            pair = places.setdefault((module, found["part"] or None), {})
            if factor in pair:
                raise files.error(key, f"{pair[factor].key} is the same matrix")
            pair[factor] = place
    if not places:
        raise ValueError(f"{files.folder} holds no matrix of an adapter of {layout.name}")
    for (module, part), pair in places.items():
        if len(pair) < 2:
            ((factor, place),) = pair.items()
            raise files.error(
                place.key, f"it is the {factor} of {module}, whose {'B' if factor == 'A' else 'A'} is missing"
            )
        yield Pair(module, part, pair["A"], pair["B"])


def whole_weights(files: MegatronFiles, layout: Layout) -> dict[str, str]:
    """Megatron module -> key of each weight that trains whole.

    Raises:
        ValueError: a module has several.
    """
    found: dict[str, str] = {}
    for key in files.tensors:
        if layout.whole is not None and (match := layout.whole.fullmatch(key)):
            if match["module"] in found:
                raise files.error(key, f"there are several adapters: {found[match['module']]} is of the same module")
            found[match["module"]] = key
    return found


def _places(files: MegatronFiles, key: str, found: re.Match[str], layer_count: int) -> Iterator[tuple[str, Place]]:
    """(full name of the module, place) of each matrix in a tensor."""
    shape, layer, alone = (
        files.tensors[key][0],
        found["layer"],
        found["layer"] is not None or found["output"] is not None,
    )
    if len(shape) != (2 if alone else 3):
        wanted = "[rows, columns]" if alone else "[layers, rows, columns]"
        raise files.error(key, f"its shape is {list(shape)}, and should be {wanted}")
    if alone:
        yield found["output"] or f"decoder.layers.{int(layer)}.{found['module']}", Place(key, None)
        return
    if shape[0] != layer_count:
        raise files.error(key, f"it is of {shape[0]} layers, and the base has {layer_count}")
    yield from ((f"decoder.layers.{number}.{found['module']}", Place(key, number)) for number in range(layer_count))


def _match(files: MegatronFiles, layout: Layout, key: str) -> re.Match[str]:
    for mark, what in _UNSUPPORTED.items():
        if mark in key:
            raise files.error(key, f"{what} are not supported")
    found = layout.key.fullmatch(key)
    if found is None:
        raise files.error(
            key, f"it is no matrix of an adapter of {layout.name} on a linear of decoder.layers or the output layer"
        )
    return found
