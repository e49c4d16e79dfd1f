"""DoRA: the adapted weight with the length of each of its rows as a parameter of its own (Liu et al. 2024, eq. 5).

    W' = g ⊙ (W + σ B A),   g = m / n,   n = ‖W + σ B A‖ of each row

m is ``lora_magnitude_vector``, [rows of the projection], cut as lora_B is. Backward takes n for a constant (section 4.3 there).
Where the ranks hold different columns of W, n is summed over them: all that DoRA communicates in forward, one number a row.
The bias is not scaled, and dropout of x acts on all that the adapter changes: ``y = x Wᵀ + bias + dropout(x) (W' - W)ᵀ``.

Without dropout the linear's output is scaled once it is whole (:class:`Rescale`), behind the base's own collective, of which
backward keeps the piece on this rank. With dropout the output needs two products with W, and these must be summed before the
collective (:class:`DoraLinear`), where backward keeps one of them as it was before the sum. The gradient of m means the same as
lora_B's: complete, or with sequence parallelism partial sums, where ranks hold the same rows.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mlora.adapter import LinearAdapter
from mlora.linear import (
    Geometry,
    add_product,
    autocast_now,
    flat_tokens,
    gradient_of_A,
    gradient_of_B,
    in_shape,
    input_gradient,
)
from parallel import collectives

_ROWS = 4096  # of a weight that are widened at a time


@torch.no_grad()
def row_norms(adapter: LinearAdapter, weight: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """n of this rank's rows, float64 [out_l], from its piece of the base weight [out_l, in_l].

    ``‖W + B A‖² = ‖W‖² + B · (2 W Aᵀ + B A Aᵀ)``, σ being in A or B, needs no matrix of W's size. A collective of the group if its
    ranks hold different columns. Sums of squares are float64, so that their order, which depends on the layout, is not seen.

    Args:
        wide: dtype of what is computed of A and B.
    """
    A, B = adapter.fused()
    with torch.autocast(weight.device.type, enabled=False):
        same = torch.promote_types(weight.dtype, wide if wide == torch.float64 else A.dtype)
        cross = torch.cat([rows.to(same) @ A.T.to(same) for rows in torch.split(weight, _ROWS)]).to(wide)
        A, B = A.to(wide), B.to(wide)
        squares: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square_()
        squares += (B * (2 * cross + B @ (A @ A.T))).sum(1, dtype=torch.float64)
    if adapter.layout.partition_dim == 1:
        squares = collectives.all_reduce_(squares, adapter.layout.group)
    # A row of zeros has next to no length, not none: its scale is not 0/0.
    return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


@torch.no_grad()
def reset_magnitudes(adapter: LinearAdapter, weight: torch.Tensor) -> None:
    """Set m to n, so that W' is W + σ B A. A collective like :func:`row_norms`."""
    norms = row_norms(adapter, weight, torch.float64)
    for part, magnitude in adapter.lora_magnitude_vector.items():
        magnitude.copy_(norms[adapter.index(part)])


def scales(adapter: LinearAdapter, weight: torch.Tensor) -> torch.Tensor:
    """g of this rank's rows [out_l], 1 where no projection is adapted; differentiable by m. A collective like :func:`row_norms`."""
    wide = torch.promote_types(adapter.dtype, torch.float32)
    # Rounded as m is, so that they are equal at the start.
    norms = row_norms(adapter, weight, wide).to(adapter.dtype).to(wide)
    found = torch.ones_like(norms)
    for part, magnitude in adapter.lora_magnitude_vector.items():
        index = adapter.index(part)
        found = found.index_copy(0, index, magnitude.to(wide) / norms[index])
    return found


class Rescale(torch.autograd.Function):
    """``g ⊙ (y - bias) + bias``, with the gradients of y and of g for the tokens of this rank's y."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """y [s, b, out_l], whole and with ``bias`` [out_l] in it if that is given; scale [out_l] -> the same shape as y."""
        ctx.save_for_backward(y, scale, bias)
        if bias is None:
            return _scaled(y, scale)
        return _scaled(y - bias, scale).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dy [s, b, out_l] -> the gradients of y and scale."""
        y, scale, bias = ctx.saved_tensors
        needs_y, needs_scale, _ = ctx.needs_input_grad
        dscale = _over_tokens(dy, y if bias is None else y - bias, scale) if needs_scale else None
        return _scaled(dy, scale) if needs_y else None, dscale, None


class DoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + dropout(x) (W' - W)ᵀ`` before the sum over ranks that hold different columns of W.

    Computed as ``(x - dropout(x)) Wᵀ + bias + g ⊙ z``, z = dropout(x) (W + B A)ᵀ with σ in A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scale: torch.Tensor,
        geometry: Geometry,
    ) -> torch.Tensor:
        """Shapes as of :class:`mlora.linear.LoraLinear`; scale [out_l].

        Raises:
            RuntimeError: the weight or the bias requires a gradient, which it would not get.
        """
        if any(ctx.needs_input_grad[1:3]):
            raise RuntimeError("an adapted linear gives its base no gradient: its weight and bias must stay frozen")
        assert geometry.dropout is not None
        whole = collectives.all_gather(x, geometry.group) if geometry.gathers else x
        dropped = geometry.dropout(whole, first_feature=geometry.first_feature)
        low = torch.nn.functional.linear(flat_tokens(dropped).to(lora_A.dtype), lora_A)
        z = add_product(torch.nn.functional.linear(low, lora_B), flat_tokens(dropped), weight.T)
        y = _scaled(z, scale) if bias is None else _scaled(z, scale).add_(bias)
        y = add_product(y, flat_tokens(whole - dropped), weight.T)
        ctx.save_for_backward(x, weight, lora_A, lora_B, low, z, scale)
        ctx.geometry, ctx.autocast = geometry, autocast_now(x.device.type)
        return in_shape(y, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dy [s, b, out_l] -> the gradients of x, lora_A, lora_B and scale."""
        x, weight, lora_A, lora_B, low, z, scale = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_x, _, _, needs_A, needs_B, needs_scale, _ = ctx.needs_input_grad
        dz = _scaled(dy, scale)
        with torch.autocast(**ctx.autocast):
            d = flat_tokens(dz).to(lora_B.dtype) @ lora_B
            dx = None
            if needs_x:
                through_dropout = add_product(d @ lora_A, flat_tokens(dz - dy), weight)
                dx = input_gradient(dy, weight, through_dropout, geometry)
            dA = gradient_of_A(x, d, geometry) if needs_A else None
            dB = gradient_of_B(dz, low, geometry) if needs_B else None
        dscale = _gradient_of_scale(dy, z, scale, geometry) if needs_scale else None
        return dx, None, None, dA, dB, dscale, None


def _gradient_of_scale(dy: torch.Tensor, z: torch.Tensor, scale: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    dscale = _over_tokens(dy, z, scale)
    if geometry.row_parallel and not geometry.sequence_parallel:
        dscale = collectives.all_reduce_(dscale, geometry.group)
    return dscale


def _scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x ⊙ scale`` in x's dtype, rounded once: scale is wider, and rounded itself it would lose what training moves it by."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def _over_tokens(dy: torch.Tensor, z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``Σ dy ⊙ z`` over the tokens, in the dtype of scale [n]; dy [..., n], z [..., n]."""
    return (flat_tokens(dy) * flat_tokens(z)).sum(0, dtype=scale.dtype)
