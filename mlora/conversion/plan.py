"""Which parameters of a base a merge changes, and by what: decided and checked before anything is written."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mlora.conversion.base import BaseModel
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

    def blocks(
        self, base: BaseModel, elements: int, buffer: torch.Tensor | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(number of the first row, rows of the base, rows to start from), in blocks of about ``elements``."""
        start = None if self.start is None else self.start.load()
        for first, rows in base.file(self.source).blocks(self.source, elements, buffer):
            yield first, rows, rows if start is None else start[first : first + len(rows)] if rows.ndim else start


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
    parameter = f"{module.name}.weight"
    if parameter not in base.where and base.tied and base.embeddings[0]:
        parameter = base.embeddings[0]
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


def _with_ties(base: BaseModel, parts: Mapping[str, _Parts], trained_as_one: bool) -> Plan:
    """Input and output embeddings that share a weight share it in the result only if the adapter says so."""
    embedding, output = base.embeddings
    sources = {parameter: parameter for parameter in parts}
    unties = base.tied and embedding is not None and not trained_as_one and bool({embedding, output} & parts.keys())
    parts = dict(parts)
    if base.tied and embedding is not None and {embedding, output} & parts.keys():
        if trained_as_one:
            _check_trained_as_one(parts.get(embedding), parts.get(output), output)
            parts[embedding] = parts.pop(output) if embedding not in parts else parts[embedding]
            parts.pop(output, None)
            if output in base.where:  # Some writers save the shared weight under both names.
                parts[output] = parts[embedding]
        else:
            parts.setdefault(output, _Parts())
        sources |= {embedding: embedding, output: embedding}
    changes = {}
    for parameter, entry in parts.items():
        changes[parameter] = Change(sources[parameter], parameter.rpartition(".")[0], tuple(entry.terms), entry.start)
        _check_fits(base, parameter, changes[parameter])
    return Plan(changes, unties)


def _check_trained_as_one(inner: _Parts | None, outer: _Parts | None, output: str) -> None:
    if inner is None or outer is None:
        return
    if inner.start is not None and outer.start is not None:
        same = torch.equal(inner.start.load(), outer.start.load())
    else:
        same = len(inner.terms) == len(outer.terms) and all(
            map(_same_change, (term.module for term in inner.terms), (term.module for term in outer.terms))
        )
    if not same:
        raise ValueError(f"the adapter says ensure_weight_tying, but its {output} differs from its input embedding")


def _same_change(inner: AdapterModule, outer: AdapterModule) -> bool:
    first, second = inner.load(), outer.load()
    if inner.embedding != outer.embedding:
        second = replace(second, A=second.B.T, B=second.A.T)
    return inner.scaling == outer.scaling and torch.equal(first.A, second.A) and torch.equal(first.B, second.B)


def _check_fits(base: BaseModel, parameter: str, change: Change) -> None:
    if change.source not in base.where:
        raise ValueError(f"{base.path} has no {change.source}: {_nearest(base, change.source)}")
    shape = base.shape(change.source)
    dtype = base.file(change.source).entries[change.source].dtype
    if base.file(change.source).dtype(change.source) not in FLOATS:
        raise ValueError(
            f"{base.path}: {change.source} is {dtype}: the base is quantised; merge into the original weights"
        )
    if change.start is not None and change.start.shape != shape:
        raise ValueError(
            f"{change.start.file}: {change.start.key} has shape {list(change.start.shape)}, and {change.source} of {base.path} "
            f"{list(shape)}: another base, or one with another vocabulary"
        )
    for term in change.terms:
        if term.module.weight_shape != shape:
            raise ValueError(
                f"{term.module.A.file}: {term.module.name} is for a weight of shape {list(term.module.weight_shape)}, and "
                f"{change.source} of {base.path} has {list(shape)}: another base"
            )


def _nearest(base: BaseModel, parameter: str) -> str:
    tail = "." + ".".join(parameter.split(".")[-4:])
    ending = [key for key in base.where if key.endswith(tail)]
    near = ending or difflib.get_close_matches(parameter, list(base.where), n=1, cutoff=0.3)
    return f"the nearest is {near[0]}" if near else f"it has {len(base.where)} parameters, none of a like name"
