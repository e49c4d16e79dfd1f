"""What an adapter is, module by module, and what is wrong with it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mlora.conversion.base import BaseModel
from mlora.conversion.coverage import misfits
from mlora.conversion.delta import product_norm
from mlora.conversion.state import AdapterModule, AdapterState


@dataclass(frozen=True)
class ModuleFacts:
    """One module. Norms are Frobenius norms.

    Attributes:
        name: of the module.
        shape: of the base's weight.
        rank: r.
        scaling: factor of B A.
        dtype: of the matrices in the file.
        dora: it has a magnitude.
        norm_A, norm_B: ||A||, ||B||.
        norm_delta: ||scaling · B A||.
        relative: ||scaling · B A|| / ||W||; None without a base.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: str
    dora: bool
    norm_A: float
    norm_B: float
    norm_delta: float
    relative: float | None


@dataclass(frozen=True)
class ParameterFacts:
    """A whole parameter that replaces the base's."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float


@dataclass(frozen=True)
class Inspection:
    """An adapter.

    Attributes:
        source: where it was read from.
        layout: how it lies there.
        parameters: trained numbers in it.
        nbytes: of its tensors.
        modules: with a low-rank term.
        full: parameters kept whole.
        problems: what keeps it from being used, or from meaning anything, a sentence each.
    """

    source: str
    layout: str
    parameters: int
    nbytes: int
    modules: list[ModuleFacts]
    full: list[ParameterFacts]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect(
    state: AdapterState,
    problems: Sequence[str],
    base: BaseModel | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> Inspection:
    """Look at an adapter, one module in memory at a time.

    Args:
        state: from :func:`~mlora.conversion.open_adapter`.
        problems: that opening it reported.
        base: its base model, to hold it against.
        progress: told bytes of the adapter as they are done.
    """
    found = [*problems, *(misfits(state, base) if base is not None else ())]
    modules: list[ModuleFacts] = []
    full: list[ParameterFacts] = []
    for module in state.modules:
        try:
            modules.append(_module(module, base))
        except ValueError as error:
            found.append(str(error))
        progress(sum(tensor.nbytes for tensor in module.tensors))
    for name, tensor in state.full.items():
        try:
            norm = float(torch.linalg.vector_norm(tensor.load().double()))
            full.append(ParameterFacts(name, tensor.shape, _name(tensor.dtype), norm))
        except ValueError as error:
            found.append(str(error))
        progress(tensor.nbytes)
    copies = [module.base_weight for module in state.modules]
    return Inspection(
        source=str(state.source),
        layout=state.layout,
        parameters=sum(torch.Size(tensor.shape).numel() for tensor in state.tensors if tensor not in copies),
        nbytes=sum(tensor.nbytes for tensor in state.tensors),
        modules=modules,
        full=full,
        problems=found + _suspicions(state, modules),
    )


def _module(module: AdapterModule, base: BaseModel | None) -> ModuleFacts:
    factors = module.load()
    A, B = factors.A.double(), factors.B.double()
    left, right = (A.T, B.T) if module.embedding else (B, A)
    delta = abs(module.scaling) * product_norm(left, right)
    relative = None
    if base is not None and (parameter := base.source(f"{module.name}.weight")) in base.where:
        blocks = base.file(parameter).blocks(parameter, 1 << 20)
        whole = sum(float(rows.double().square().sum()) for _, rows in blocks) ** 0.5
        relative = delta / whole if whole else None
    return ModuleFacts(
        name=module.name,
        shape=module.weight_shape,
        rank=module.rank,
        scaling=module.scaling,
        dtype=_name(module.B.dtype),
        dora=module.magnitude is not None,
        norm_A=float(torch.linalg.matrix_norm(A)),
        norm_B=float(torch.linalg.matrix_norm(B)),
        norm_delta=delta,
        relative=relative,
    )


def _suspicions(state: AdapterState, modules: list[ModuleFacts]) -> list[str]:
    """What is legal and still hardly meant."""
    found = []
    zero = [module.name for module in modules if module.norm_delta == 0 and not module.dora]
    if zero:
        found.append(f"{state.source}: B A is zero in {len(zero)} of {len(modules)} modules, first {zero[0]}")
    doubled = [name for name, count in Counter(module.name for module in state.modules).items() if count > 1]
    return found + [f"{state.source}: {name} is there more than once" for name in doubled]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
