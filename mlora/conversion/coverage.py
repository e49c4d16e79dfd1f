"""Whether an adapter and a base belong together: every module of the one in the other."""

import difflib
from collections.abc import Iterator

from mlora.conversion.base import BaseModel
from mlora.conversion.peft_config import CONFIG_FILE, PeftConfig
from mlora.conversion.state import AdapterState


def misfits(state: AdapterState, base: BaseModel) -> Iterator[str]:
    """What keeps an adapter from fitting a base, a sentence each: modules missing on either side, other shapes."""
    for module in state.modules:
        if problem := _misfit(state, base, f"{module.name}.weight", module.weight_shape):
            yield problem
    for parameter, tensor in state.full.items():
        if problem := _misfit(state, base, parameter, tensor.shape):
            yield problem
    if state.format == "peft":
        yield from _untouched(state, base)


def _misfit(state: AdapterState, base: BaseModel, parameter: str, shape: tuple[int, ...]) -> str | None:
    name = base.source(parameter)
    if name not in base.where:
        return f"{state.source} adapts {parameter}, which {base.path} has not; {_nearest(base, parameter)}"
    if base.shape(name) != shape:
        return (
            f"{state.source} is for a {parameter} of shape {list(shape)}, and that of {base.path} has {list(base.shape(name))}: "
            f"another base, or another vocabulary"
        )
    return None


def _untouched(state: AdapterState, base: BaseModel) -> Iterator[str]:
    """Modules that PEFT would give a term by the configuration, and leave as initialised, because the file has none."""
    config = PeftConfig.from_dict(state.config, str(state.source / CONFIG_FILE), lambda problem: None)
    adapted = state.by_name
    for parameter in base.where:
        module, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and len(base.shape(parameter)) == 2 and module not in adapted and config.targets(module):
            yield f"{state.source}: {CONFIG_FILE} targets {module}, but the file has no tensors for it"


def _nearest(base: BaseModel, parameter: str) -> str:
    tail = "." + ".".join(parameter.split(".")[-4:])
    ending = [key for key in base.where if key.endswith(tail)]
    near = ending or difflib.get_close_matches(parameter, list(base.where), n=1, cutoff=0.3)
    return f"the nearest is {near[0]}" if near else f"none of its {len(base.where)} parameters has a like name"
