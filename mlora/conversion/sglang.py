"""What SGLang needs beside an adapter's own modules: it stacks projections, and fails or drops the others if one is missing.

| stacked | must be there | else |
|---|---|---|
| q, k, v | q and v | without v loading fails; without q the others are not applied |
| gate, up | both | up alone is not stacked |

Its buffers are made by last parts of names, for every layer alike. What is missing is added with zeros, which change nothing.
"""

from collections.abc import Collection

from mlora.conversion.peft_writer import PeftAdapter, zero_module
from mlora.conversion.portable import Request, check_plain, uniform_adapter
from mlora.conversion.selection import in_layer
from mlora.conversion.state import AdapterModule, AdapterState, natural_order
from mlora.pretrained import Pretrained
from mlora.targets import layer_index

# Last parts of names that are stacked together -> those of them that must be there.
STACKED = {("q_proj", "k_proj", "v_proj"): ("q_proj", "v_proj"), ("gate_proj", "up_proj"): ("gate_proj", "up_proj")}
# Projections with as many output features.
_ALIKE = {"v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


def sglang(request: Request) -> PeftAdapter:
    """The portable profile with zeros where a projection is missing."""
    check_plain(request.state, "sglang")
    return uniform_adapter(request, with_stacked(request.state, request.base))


def with_stacked(state: AdapterState, base: Pretrained | None) -> list[AdapterModule]:
    """The adapter's modules and the zero ones that SGLang needs, in the model's order.

    Raises:
        ValueError: neither the adapter nor ``base`` tells the shape of a module that is to be added.
    """
    present = state.by_name
    found = dict(present)
    for name in _missing(present):
        found[name] = zero_module(name, _shape(name, found, state, base), next(iter(present.values())))
    return sorted(found.values(), key=lambda module: natural_order(module.name))


def stacked_with(names: Collection[str]) -> set[str]:
    """The modules that must be there because of these, these included or not."""
    wanted = set()
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for stacked, needed in STACKED.items():
            if leaf in stacked:
                wanted |= {f"{parent}.{other}" for other in needed}
    return wanted


def _missing(names: Collection[str]) -> list[str]:
    """The modules that must be added: those stacked with others, and, as buffers are made for all layers, all kinds everywhere."""
    wanted = {*names, *stacked_with(names)}
    inside = {name for name in wanted if layer_index(name, None) is not None}
    layers = {layer_index(name, None) for name in inside}
    wanted |= {in_layer(name, layer) for name in inside for layer in layers if layer is not None}
    return sorted(wanted - {*names}, key=natural_order)


def _shape(name: str, found: dict[str, AdapterModule], state: AdapterState, base: Pretrained | None) -> tuple[int, int]:
    """[out, in] of a module that the adapter lacks: of its kind in another layer, of its like, or the base's."""
    parent, _, leaf = name.rpartition(".")
    same_kind = (module for other, module in found.items() if in_layer(other, 0) == in_layer(name, 0))
    alike = found.get(f"{parent}.{_ALIKE.get(leaf)}")
    if (like := next(same_kind, alike)) is not None:
        return like.weight_shape
    if base is not None:
        shape = base.family.tensors(base.architecture).get(f"{name}.weight")
        if shape is None:
            raise ValueError(
                f"{state.source}: {base.path} has no {name}, which SGLang needs beside the adapter's modules"
            )
        return shape[0], shape[1]
    raise ValueError(
        f"{state.source} has no {name}, which SGLang needs; to add it with zeros, its shape must be known: give the base model"
    )
