"""The adapted linear at nearly the cost of the frozen one: the low-rank columns ride in the base's own GEMMs and collectives.

With P = [W | B] (:mod:`mlora.packed`), v the input or its RMS norm, t ranks and the sums over ranks in the base's own collectives:

    forward    [v | s], s = v Aᵀ,  y = [v | s] Pᵀ
    backward   [g | d] = dy P,  dx from g + d A,  dA = dᵀ v,  dB = dyᵀ s

Where this needs a copy of x or dy for its own sake, the shapes say what moves fewer bytes: the copy, or a pass over the result.
With many ranks, each half of a gated linear multiplies its own alone, in a GEMM of its own (:attr:`Packed.fold`).
With the adapter off, W alone is read, whatever another adapter has left beside it.

| base | what is communicated, p columns wider than the frozen base's |
|---|---|
| column-parallel | all-reduce of [g \\| d]; with sequence parallelism all-gather of [v \\| s] and reduce-scatter of [g \\| d] |
| replicated | nothing |
| row-parallel | y and dy alone; without sequence parallelism also an all-reduce of s (T·p) in backward, for dB |

Gradients mean the same as in :mod:`mlora.linear`. :class:`FusedMlp` joins a gated MLP's two linears over SwiGLU, whose backward
then does three of the six low-rank products.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mlora.kernels.mask import Mask
from mlora.kernels.norm import norm_gradient, norm_products
from mlora.kernels.operand import RMSNORM, SWIGLU, low_product, make_operand
from mlora.kernels.products import add_low_rank, token_product
from mlora.kernels.swiglu import swiglu_backward
from mlora.kernels.tile import adds_a_wave
from mlora.linear import Geometry
from mlora.packed import Packed
from parallel import collectives


@dataclass(frozen=True)
class Norm:
    """The RMS norm in front of a linear: weight [in] (frozen) and epsilon."""

    weight: torch.Tensor
    eps: float


class FusedLinear(torch.autograd.Function):
    """``y = norm(x) Wᵀ + bias + dropout(norm(x)) Aᵀ Bᵀ``; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: Norm | None,
        bias: torch.Tensor | None,
        packed: Packed,
        geometry: Geometry,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """x [s, b, in_l] ([s/t, b, in] if the base gathers) -> y in the base's layout.

        ``parameters`` are those of ``packed``, in its order; without them the adapter is off.
        """
        flat, mask = x.flatten(0, 1), _mask(geometry, x)
        now = bias if not geometry.row_parallel else None
        y, low, rstd = _adapted(flat, packed, bool(parameters), norm, now, mask, geometry)
        y = _after_forward(y, geometry)
        if geometry.row_parallel and bias is not None:
            y += bias
        ctx.save_for_backward(flat, rstd, low)
        ctx.norm, ctx.packed, ctx.geometry, ctx.mask, ctx.shape = norm, packed, geometry, mask, x.shape
        ctx.active, ctx.version = bool(parameters), packed.version
        return y.view(-1, x.shape[1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dy in y's layout -> the gradients of x and of the parameters."""
        x, rstd, low = ctx.saved_tensors
        packed: Packed = ctx.packed
        geometry: Geometry = ctx.geometry
        packed.check(ctx.version)
        dy = _before_backward(dy.flatten(0, 1), geometry)
        if not ctx.active:
            g = _sum_over_ranks(dy @ packed.base, geometry)
            return _input_and_A(g, x, rstd, low, packed.lora_A[:0], ctx)[0], None, None, None, None
        packed.refill()
        if ctx.norm is None and geometry.row_parallel and _copies_dy(dy, packed, ctx.mask):
            g, d = _complete(dy, packed)
            dx, dA = g.view(ctx.shape), token_product(d, x, packed.ranks)
        else:
            g = _sum_over_ranks(_input_gradient(dy, packed), geometry)
            dx, dA = _input_and_A(g, x, rstd, low, packed.lora_A, ctx)
        dB = token_product(_low_for_dB(low, geometry), dy, packed.ranks)
        return dx, None, None, None, None, *packed.gradients(dA, dB, ctx.norm and ctx.norm.weight)


class FusedMlp(torch.autograd.Function):
    """A gated MLP, ``fc2(silu(gate) · up)`` with [gate, up] = fc1(norm(x)), both linears adapted and without bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: Norm | None,
        packed: tuple[Packed, Packed],
        geometries: tuple[Geometry, Geometry],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """x [s, b, h] ([s/t, b, h] with sequence parallelism) -> y [s, b, h] likewise; ``parameters`` of fc1, then of fc2."""
        (first, second), (one, two) = packed, geometries
        flat, mask1 = x.flatten(0, 1), _mask(one, x)
        between, low1, rstd = _adapted(flat, first, True, norm, None, mask1, one)
        mask2 = _mask(two, between.view(-1, x.shape[1], between.shape[1]))
        operand, low2, _ = make_operand(between, second.padded_A, second.tail, kind=SWIGLU, mask=mask2)
        y = _after_forward(operand @ second.weight.T, two)
        ctx.save_for_backward(flat, rstd, low1, between, low2)
        ctx.norm, ctx.packed, ctx.geometries, ctx.geometry = norm, packed, geometries, one
        ctx.mask, ctx.mask2, ctx.shape = mask1, mask2, x.shape
        ctx.versions = first.version, second.version
        return y.view(-1, x.shape[1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dy in y's layout -> the gradients of x and of the parameters."""
        x, rstd, low1, between, low2 = ctx.saved_tensors
        (first, second), (one, two) = ctx.packed, ctx.geometries
        for packed, version in zip(ctx.packed, ctx.versions, strict=True):
            packed.check(version)
            packed.refill()
        dy = _before_backward(dy.flatten(0, 1), two)
        if _copies_dy(dy, second, ctx.mask2):
            (g, d), missing_A = _complete(dy, second), None
        else:
            both, features = _input_gradient(dy, second), between.shape[1] // 2
            g, d, missing_A = both[:, :features], both[:, features : features + second.ranks], second.lora_A
        dB2 = token_product(_low_for_dB(low2, two), dy, second.ranks)
        between, dA2, dB1, correlation = swiglu_backward(g, d, between, missing_A, low1, first.halves, ctx.mask2)
        g = _sum_over_ranks(_input_gradient(between, first), one)
        correlation = _sum_over_ranks(correlation, one)
        dx, dA1 = _input_and_A(g, x, rstd, low1, first.lora_A, ctx, correlation)
        factor = ctx.norm and ctx.norm.weight
        return dx, None, None, None, *first.gradients(dA1, dB1, factor), *second.gradients(dA2, dB2)


def _adapted(
    x: torch.Tensor,
    packed: Packed,
    active: bool,
    norm: Norm | None,
    bias: torch.Tensor | None,
    mask: Mask | None,
    geometry: Geometry,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y before the base's sum over the ranks, s of all tokens that y is of, rstd) of x [T, in]; not active, s has no columns."""
    out, features = packed.base.shape
    as_it_is = norm is None and not geometry.gathers
    if as_it_is and not active:
        return _product(x, packed.base, bias), x[:, :0], x.new_empty(0)
    if as_it_is and features >= out and not packed.fold:
        low = low_product(x, packed.padded_A, mask)
        y = _product(low, packed.weight[:, features:], bias)
        return y.addmm_(x, packed.base.T), low, x.new_empty(0)
    A, tail = (packed.padded_A, packed.tail) if active else (None, 0)
    if norm is None:
        operand, low, rstd = make_operand(x, A, tail, mask=mask)
    else:
        operand, low, rstd = make_operand(x, A, tail, kind=RMSNORM, norm_weight=norm.weight, eps=norm.eps, mask=mask)
    if geometry.gathers:
        operand = collectives.all_gather(operand, geometry.group)
        low = operand[:, features:].contiguous()
    if active and packed.fold:
        return _folded_product(operand, low, packed, bias), low, rstd
    return _product(operand, packed.weight if active else packed.base, bias), low, rstd


def _folded_product(
    operand: torch.Tensor, low: torch.Tensor, packed: Packed, bias: torch.Tensor | None
) -> torch.Tensor:
    """y of ``[v | s]``, each half of its columns with its own ranks alone; s in the operand is used up."""
    out, features = packed.base.shape
    y = operand.new_empty(operand.shape[0], out)
    width = features + packed.fold
    for half, (first, count) in zip(_halves(out), packed.halves, strict=True):
        operand[:, features : features + count] = low[:, first : first + count]
        torch.mm(operand[:, :width], packed.weight[half, :width].T, out=y[:, half])
    return y if bias is None else y.add_(bias)


def _input_gradient(dy: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``[g | d]`` [T, in + p] = dy ``[W | B]``: by one GEMM, or by two where d's columns would make it run a wave longer.

    Where B is folded, by one and another for each half of d, whose columns past R are then not set.
    """
    out, features = packed.base.shape
    if not packed.fold and not adds_a_wave(dy.shape[0], features, packed.tail):
        return dy @ packed.weight
    both = dy.new_empty(dy.shape[0], features + packed.tail)
    torch.mm(dy, packed.base, out=both[:, :features])
    if not packed.fold:
        torch.mm(dy, packed.weight[:, features:], out=both[:, features:])
        return both
    for half, (first, count) in zip(_halves(out), packed.halves, strict=True):
        d = both[:, features + first : features + first + count]
        torch.mm(dy[:, half], packed.weight[half, features : features + count], out=d)
    return both


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, size // 2), slice(size // 2, size)


def _copies_dy(dy: torch.Tensor, packed: Packed, mask: Mask | None) -> bool:
    """Whether to copy dy beside d for a product with ``[W; A]`` moves less than to add d A to what its product with W gave."""
    return mask is None and 2 * packed.base.shape[1] > 3 * dy.shape[1]


def _complete(dy: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """(g + d A, d) of a linear without dropout whose dy [T, out] is whole."""
    out, features = packed.base.shape
    wide, _, _ = make_operand(dy, None, packed.tail)
    torch.mm(dy, packed.weight[:, features:], out=wide[:, out:])
    return wide @ packed.upright, wide[:, out : out + packed.ranks]


def _mask(geometry: Geometry, x: torch.Tensor) -> Mask | None:
    if geometry.dropout is None:
        return None
    return Mask.of(geometry.dropout, x.shape[1], geometry.first_token(x.shape[0]), geometry.first_feature)


def _product(operand: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return operand @ weight.T if bias is None else torch.addmm(bias, operand, weight.T)


def _after_forward(y: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The base's own sum of a row-parallel output over the ranks."""
    if not geometry.row_parallel:
        return y
    if geometry.sequence_parallel:
        return collectives.reduce_scatter(y, geometry.group)
    return collectives.all_reduce(y, geometry.group)


def _before_backward(dy: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of a row-parallel output for all tokens."""
    dy = dy.contiguous()
    if geometry.row_parallel and geometry.sequence_parallel:
        return collectives.all_gather(dy, geometry.group)
    return dy


def _sum_over_ranks(g: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The base's own sum of a column-parallel input gradient over the ranks; d comes complete with it."""
    if geometry.row_parallel or geometry.replicated:
        return g
    if geometry.gathers:
        return collectives.reduce_scatter(g, geometry.group)
    return collectives.all_reduce(g, geometry.group)


def _low_for_dB(low: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    if geometry.row_parallel and not geometry.sequence_parallel:
        return collectives.all_reduce(low, geometry.group)
    return low


def _input_and_A(
    g: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    low: torch.Tensor,
    lora_A: torch.Tensor,
    ctx: Any,
    correlation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx in x's shape, partial sums of dA but for the norm's weight) from ``[g | d]`` for this rank's tokens."""
    norm: Norm | None = ctx.norm
    if norm is None:
        if g.shape[1] == x.shape[1]:
            return g.view(ctx.shape), low
        dA = token_product(g[:, x.shape[1] :], x, lora_A.shape[0], mask=ctx.mask)
        return add_low_rank(g, lora_A, ctx.mask).view(ctx.shape), dA
    if ctx.geometry.gathers:
        low = low.chunk(ctx.geometry.group.size())[ctx.geometry.group.rank()]
    dA, correlation = norm_products(g, x, norm.weight, rstd, low, lora_A.shape[0], ctx.mask, correlation)
    return norm_gradient(g, x, norm.weight, rstd, lora_A, correlation, ctx.mask).view(ctx.shape), dA
