"""Which parameters of a base a merge changes, and by what: decided and checked before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mlora.conversion.base import BaseModel
from mlora.conversion.coverage import misfits
from mlora.conversion.delta import Term
from mlora.conversion.safetensors_file import FLOATS
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor


@dataclass(frozen=True)
class Change:
    """What a parameter of the result is made of.

    Attributes:
        source: the parameter of the base that it starts from: itself but for an output layer that was tied.
        terms: low-rank terms that are added.
        start: a tensor to start from in the place of ``source``: a whole parameter, or a targeted embedding's own base weight.
        module: its name.
    """

    source: str
    module: str
    terms: tuple[Term, ...] = ()
    start: LazyTensor | None = None

    def blocks(self, base: BaseModel, elements: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(number of the first row, rows of the base, rows to start from), in blocks of about ``elements``."""
        start = None if self.start is None else self.start.load()
        for span, rows in base.file(self.source).blocks(self.source, elements):
            yield span.first, rows, rows if start is None else span.of(start)


@dataclass(frozen=True)
class Plan:
    """A merge.

    Attributes:
        changes: by the parameter of the result; parameters without one stay as they are.
        unties: the output layer was tied to the embedding in the base, and is a parameter of its own in the result.
    """

    changes: Mapping[str, Change]
    unties: bool = False


@dataclass
class _Parts:
    """What adapters say about one parameter, while they are gone through."""

    terms: list[Term] = field(default_factory=list)
    start: LazyTensor | None = None


def plan(base: BaseModel, adapters: Sequence[tuple[AdapterState, float]]) -> Plan:
    """The changes that adapters, each with its weight, make to a base.

    Raises:
        ValueError: a module is not in the base or has another shape; adapters cannot be added up (DoRA or whole parameters with
            another adapter or a weight other than 1). The module is named.
    """
    parts: dict[str, _Parts] = {}
    for state, weight in ((_without_copies(base, state), weight) for state, weight in adapters):
        for problem in misfits(state, base):
            raise ValueError(problem)
        _check_can_be_summed(state, weight, len(adapters))
        for module in state.modules:
            entry = parts.setdefault(f"{module.name}.weight", _Parts())
            entry.terms.append(Term(weight, module))
            entry.start = module.base_weight
        for parameter, tensor in state.full.items():
            if parameter in parts:
                raise ValueError(f"{state.source}: {parameter} replaces what another adapter changes")
            parts[parameter] = _Parts(start=tensor)
    if not parts:
        raise ValueError("the adapters hold nothing to merge")
    return _with_ties(base, parts, any(state.ties_embeddings for state, _ in adapters))


def _without_copies(base: BaseModel, state: AdapterState) -> AdapterState:
    """The adapter without the base weights that it brings along and that are the base's own."""
    return replace(
        state,
        modules=tuple(
            replace(module, base_weight=None) if _brings_copy(base, module) else module for module in state.modules
        ),
    )


def _brings_copy(base: BaseModel, module: AdapterModule) -> bool:
    if module.base_weight is None:
        return False
    parameter = base.source(f"{module.name}.weight")
    if parameter not in base.where or base.shape(parameter) != module.base_weight.shape:
        return False
    own = base.file(parameter).read(parameter)
    return torch.equal(own, module.base_weight.load().to(own.dtype))


def _check_can_be_summed(state: AdapterState, weight: float, count: int) -> None:
    if weight == 0:
        raise ValueError(f"{state.source} has weight 0: leave it out")
    if count == 1 and weight == 1:
        return
    if state.uses_dora:
        raise ValueError(f"{state.source} is a DoRA adapter: it can only be merged alone and with weight 1")
    if state.full or any(module.base_weight for module in state.modules):
        name = next(iter(state.full), None) or next(module.name for module in state.modules if module.base_weight)
        raise ValueError(f"{state.source} brings {name} as a whole: it can only be merged alone and with weight 1")


def _with_ties(base: BaseModel, parts: dict[str, _Parts], trained_as_one: bool) -> Plan:
    """Input and output embeddings that share a weight go on sharing it if they change alike, or were trained as one."""
    embedding, output = base.embeddings
    unties = False
    if base.tied and embedding is not None and {embedding, output} & parts.keys():
        inner, outer = parts.pop(embedding, None), parts.pop(output, None)
        alike = inner is not None and outer is not None and _alike(inner, outer)
        if trained_as_one and inner and outer and not alike:
            raise ValueError(f"the adapter says ensure_weight_tying, but its {output} differs from its input embedding")
        unties = not (alike or trained_as_one)
        if inner or not unties:
            parts[embedding] = inner or outer or _Parts()
        if unties:
            parts[output] = outer or _Parts()
        elif output in base.where:  # Some writers save the shared weight under both names.
            parts[output] = parts[embedding]
    changes = {}
    for parameter, entry in parts.items():
        source = base.source(parameter)
        _check_readable(base, source)
        changes[parameter] = Change(source, parameter.rpartition(".")[0], tuple(entry.terms), entry.start)
    return Plan(changes, unties)


def _alike(inner: _Parts, outer: _Parts) -> bool:
    if (inner.start is None) != (outer.start is None) or len(inner.terms) != len(outer.terms):
        return False
    if inner.start is not None and outer.start is not None and not torch.equal(inner.start.load(), outer.start.load()):
        return False
    return all(
        one.weight == other.weight and _same_change(one.module, other.module)
        for one, other in zip(inner.terms, outer.terms, strict=True)
    )


def _same_change(inner: AdapterModule, outer: AdapterModule) -> bool:
    first, second = inner.load(), outer.load()
    if first.magnitude is not None or second.magnitude is not None or inner.scaling != outer.scaling:
        return False
    if inner.embedding != outer.embedding:
        second = replace(second, A=second.B.T, B=second.A.T)
    return torch.equal(first.A, second.A) and torch.equal(first.B, second.B)


def _check_readable(base: BaseModel, source: str) -> None:
    if base.file(source).dtype(source) not in FLOATS:
        dtype = base.file(source).entries[source].dtype
        raise ValueError(f"{base.path}: {source} is {dtype}: the base is quantised; merge into the original weights")
