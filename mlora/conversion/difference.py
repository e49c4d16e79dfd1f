"""Whether two adapters make the same model, whatever their formats, ranks and scalings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mlora.conversion.delta import product_norm
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor


@dataclass(frozen=True)
class Difference:
    """How far apart one module, or one whole parameter, is.

    Attributes:
        name: of the module or parameter.
        relative: ||first - second|| / the larger norm, of what is added to the base; infinite if they cannot be subtracted.
        why: in words, if a number does not say it.
    """

    name: str
    relative: float
    why: str = ""


def compare(
    first: AdapterState, second: AdapterState, progress: Callable[[int], None] = lambda size: None
) -> list[Difference]:
    """Every module and whole parameter of either adapter, in the model's order.

    Identical matrices are seen at once; for others the norm of scaling·B A's difference is computed from the factors, in float64
    and to about 1e-16 of the larger, without the product. A module that only one has is compared with zero.

    Args:
        progress: told the bytes of ``first`` as they are done.
    """
    ours, theirs = first.by_name, second.by_name
    found = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        found.append(_module(name, ours.get(name), theirs.get(name)))
        progress(sum(tensor.nbytes for tensor in ours[name].tensors) if name in ours else 0)
    for name in [*first.full, *(name for name in second.full if name not in first.full)]:
        found.append(_parameter(name, first.full.get(name), second.full.get(name)))
        progress(first.full[name].nbytes if name in first.full else 0)
    return found


def _module(name: str, first: AdapterModule | None, second: AdapterModule | None) -> Difference:
    if first is None or second is None:
        only = first or second
        assert only is not None
        if only.magnitude is None and _norm([(1.0, only)]) == 0:
            return Difference(name, 0.0, "only in one, and zero there")
        return Difference(name, 1.0, f"only in the {'second' if first is None else 'first'}")
    if first.weight_shape != second.weight_shape:
        return Difference(name, float("inf"), f"shapes {list(first.weight_shape)} and {list(second.weight_shape)}")
    if (first.magnitude is None) != (second.magnitude is None):
        return Difference(name, float("inf"), f"DoRA only in the {'first' if first.magnitude else 'second'}")
    relative, why = _delta(first, second), ""
    for label, one, other in (
        ("magnitude", first.magnitude, second.magnitude),
        ("base weight", first.base_weight, second.base_weight),
    ):
        # A base weight that only one brings along is the base's own: formats differ in whether they repeat it.
        if one is not None and other is not None and (value := _tensors(one, other)) > relative:
            relative, why = value, label
    return Difference(name, relative, why)


def _delta(first: AdapterModule, second: AdapterModule) -> float:
    if first.scaling == second.scaling and first.embedding == second.embedding and first.rank == second.rank:
        ours, theirs = first.load(), second.load()
        if torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B):
            return 0.0
    larger = max(_norm([(1.0, first)]), _norm([(1.0, second)]))
    return _norm([(1.0, first), (-1.0, second)]) / larger if larger else 0.0


def _norm(terms: Iterable[tuple[float, AdapterModule]]) -> float:
    """||Σ sign · scaling · B A||."""
    left, right = [], []
    for sign, module in terms:
        factors = module.load()
        A, B = factors.A.double(), factors.B.double()
        outer, inner = (A.T, B.T) if module.embedding else (B, A)
        left.append(outer * (sign * module.scaling))
        right.append(inner)
    return product_norm(torch.cat(left, 1), torch.cat(right))


def _parameter(name: str, first: LazyTensor | None, second: LazyTensor | None) -> Difference:
    if first is None or second is None:
        return Difference(name, float("inf"), f"whole parameter only in the {'second' if first is None else 'first'}")
    if first.shape != second.shape:
        return Difference(name, float("inf"), f"shapes {list(first.shape)} and {list(second.shape)}")
    return Difference(name, _tensors(first, second))


def _tensors(first: LazyTensor, second: LazyTensor) -> float:
    ours, theirs = first.load(), second.load()
    if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    larger = max(float(torch.linalg.vector_norm(ours)), float(torch.linalg.vector_norm(theirs)))
    return float(torch.linalg.vector_norm(ours - theirs)) / larger if larger else 0.0
