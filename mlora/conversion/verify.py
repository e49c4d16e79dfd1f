"""A merged model held against its base and adapters, read back from disk and computed again in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlora.conversion.base import BaseModel
from mlora.conversion.delta import Delta
from mlora.conversion.plan import Change, Plan

BLOCK = 1 << 22  # elements in work at a time


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        parameters: how many were compared: all.
        changed: how many of them the adapters change.
        rounding: the greatest ||W' - W - delta|| / ||delta|| of a weight: how much of a delta rounding took.
        module: where that is.
    """

    parameters: int
    changed: int
    rounding: float
    module: str


def verify(
    base: BaseModel, todo: Plan, result: BaseModel, device: torch.device, progress: Callable[[int], None]
) -> Verification:
    """Compare W' - W with the adapters' delta, element by element, and every other parameter with the base's.

    An element may be off by half a unit in the last place of the result's dtype and the float32 error of a dot product of r terms.

    Raises:
        ValueError: one is off by more, or a parameter is missing or left over; it is named.
    """
    expected = base.where.keys() | todo.changes.keys()
    for key in sorted(expected ^ result.where.keys()):
        raise ValueError(f"{result.path}: {key} is {'missing' if key in expected else 'left over'}")
    rounding, module = 0.0, ""
    for parameter in result.where:
        change = todo.changes.get(parameter)
        if change is None or (not change.terms and change.start is None):
            _check_same(base, change.source if change else parameter, result, parameter, progress)
        else:
            taken = _check_changed(base, parameter, change, result, device, progress)
            if taken > rounding:
                rounding, module = taken, change.module
    return Verification(len(result.where), len(todo.changes), rounding, module)


def _check_same(
    base: BaseModel, source: str, result: BaseModel, parameter: str, progress: Callable[[int], None]
) -> None:
    ours, theirs = result.file(parameter), base.file(source)
    if ours.entries[parameter].dtype == theirs.entries[source].dtype:
        same = ours.entries[parameter].shape == theirs.entries[source].shape
        same = same and all(map(torch.equal, ours.pieces(parameter), theirs.pieces(source)))
    else:
        blocks = zip(ours.blocks(parameter, BLOCK), theirs.blocks(source, BLOCK), strict=True)
        same = all(torch.equal(mine, other.to(mine.dtype)) for (_, mine), (_, other) in blocks)
    if not same:
        raise ValueError(f"{ours.path}: {parameter} is not the base's, and no adapter changes it")
    progress(theirs.entries[source].nbytes)


def _check_changed(
    base: BaseModel,
    parameter: str,
    change: Change,
    result: BaseModel,
    device: torch.device,
    progress: Callable[[int], None],
) -> float:
    """||W' - W - delta|| / ||delta||."""
    delta = Delta(change.terms, torch.float64, device) if change.terms else None
    norms = None if delta is None else delta.column_norms(change.blocks(base, BLOCK))
    lost = whole = 0.0
    blocks = zip(result.file(parameter).blocks(parameter, BLOCK), change.blocks(base, BLOCK), strict=True)
    for (_, merged), (first, rows, start) in blocks:
        ours, exact = merged.to(device, torch.float64), start.to(device, torch.float64)
        sizes, terms = exact.abs(), 0
        if delta is not None:
            terms = len(delta.right)
            sizes.addmm_(delta.left[first : first + len(rows)].abs(), delta.right.abs())
            plain = delta.add_to(exact.clone(), first)
            exact = delta.normalise(plain.clone(), first, norms)
            if delta.magnitude is not None:
                sizes *= (exact / plain).abs().nan_to_num_(1.0)
        last = torch.finfo(merged.dtype)
        arithmetic = torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps * (terms + 16)
        bound = exact.abs() * (last.eps / 2) + sizes * arithmetic + last.smallest_normal * last.eps
        _check_bound(result, parameter, ours, exact, bound)
        lost += float((ours - exact).square().sum())
        whole += float((exact - rows.to(exact)).square().sum())
        progress(rows.nbytes)
    return (lost / whole) ** 0.5 if whole else 0.0


def _check_bound(
    result: BaseModel, parameter: str, ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor
) -> None:
    wrong = ~((ours - exact).abs() <= bound)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{result.path}: {parameter} is {float(ours[at])!r} where W + delta is {float(exact[at])!r}; "
            f"{int(wrong.sum())} elements of a block of rows are off"
        )
