"""The adapted linear: forward and backward of a frozen linear with its low-rank term, in one autograd function.

With t ranks, x_l, W_l, A_l, B_l the pieces of a rank, σ folded into A, T tokens and R the ranks of all its projections together:

| base | forward | backward |
|---|---|---|
| column-parallel | y_l = x W_lᵀ + s B_lᵀ, s = x Aᵀ | d_l = dy_l B_l, dx = Σ_l (dy_l W_l + d_l A), dB_l = dy_lᵀ s, dA = (Σ_l d_l)ᵀ x |
| row-parallel | y = Σ_l (x_l W_lᵀ + p_l Bᵀ), p_l = x_l A_lᵀ | d = dy B, dx_l = dy W_l + d A_l, dA_l = dᵀ x_l, dB = dyᵀ Σ_l p_l |

The sums over y and dx are the base's own collectives, into which the low-rank term goes. What is left is of size T x R:

| base | without sequence parallelism | with it |
|---|---|---|
| column-parallel | all-reduce of d in backward | reduce-scatter of d in backward; dA is this rank's part of the sum over the sequence |
| row-parallel | all-reduce of p in backward | none; dB is this rank's part of the sum over ranks |

Megatron's finalize step completes those partial sums (the parameters say ``sequence_parallel``); the others are complete here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mlora.dropout import Dropout
from parallel import collectives


@dataclass(frozen=True)
class Geometry:
    """What the function needs to know of the linear and its group.

    Attributes:
        row_parallel: the group's ranks hold different columns of W; else different rows.
        sequence_parallel: activations outside the group's linears are cut along the sequence.
        group: of the ranks that share the linear.
        reduce_dx: the base asks its implementation to sum the input gradient over the group.
        first_feature: of this rank's input features among all.
        dropout: of the input of A; None for none.
    """

    row_parallel: bool
    sequence_parallel: bool
    group: dist.ProcessGroup
    reduce_dx: bool
    first_feature: int
    dropout: Dropout | None

    @property
    def gathers(self) -> bool:
        """The input is this rank's piece of the sequence and the linear works on the whole of it."""
        return self.sequence_parallel and not self.row_parallel


class LoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + dropout(x) Aᵀ Bᵀ`` with W and the bias frozen; see the module's text."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        geometry: Geometry,
    ) -> torch.Tensor:
        """x [s, b, in_l] ([s/t, b, in] if it gathers), weight [out_l, in_l], lora_A [R, in_l], lora_B [out_l, R] -> [s, b, out_l]."""
        whole = collectives.all_gather(x, geometry.group) if geometry.gathers else x
        dropped = geometry.dropout(whole, first_feature=geometry.first_feature) if geometry.dropout else whole
        low = torch.nn.functional.linear(dropped.to(lora_A.dtype), lora_A)
        y = torch.nn.functional.linear(whole, weight, bias)
        ctx.save_for_backward(x, weight, lora_A, lora_B, low)
        ctx.geometry = geometry
        return (y + torch.nn.functional.linear(low, lora_B)).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """dy [s, b, out_l] -> the gradients of x, lora_A and lora_B."""
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        d = dy.to(lora_B.dtype) @ lora_B
        dx = _input_gradient(dy, weight, d @ lora_A, geometry) if needs_x else None
        dA = _gradient_of_A(x, d, geometry) if needs_A else None
        dB = _gradient_of_B(dy, low, geometry) if needs_B else None
        return dx, None, None, dA, dB, None


def _input_gradient(dy: torch.Tensor, weight: torch.Tensor, low_dx: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    if geometry.dropout:
        low_dx = geometry.dropout(low_dx, first_feature=geometry.first_feature)
    dx = dy @ weight
    dx = (dx + low_dx).to(dx.dtype)
    if geometry.gathers:
        return collectives.reduce_scatter(dx, geometry.group)
    return collectives.all_reduce(dx, geometry.group) if geometry.reduce_dx else dx


def _gradient_of_A(x: torch.Tensor, d: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    if geometry.gathers:
        d = collectives.reduce_scatter(d, geometry.group)
    elif not geometry.row_parallel:
        d = collectives.all_reduce(d, geometry.group)
    if geometry.dropout:
        first_token = geometry.group.rank() * x.shape[0] if geometry.gathers else 0
        x = geometry.dropout(x, first_token=first_token, first_feature=geometry.first_feature)
    return _token_product(d, x.to(d.dtype))


def _gradient_of_B(dy: torch.Tensor, low: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    if geometry.row_parallel and not geometry.sequence_parallel:
        low = collectives.all_reduce(low, geometry.group)
    return _token_product(dy.to(low.dtype), low)


def _token_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of left ⊗ right: [s, b, m], [s, b, n] -> [m, n]."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)
