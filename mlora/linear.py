"""The adapted linear: forward and backward of a frozen linear with its low-rank term, in one autograd function.

With t ranks, x_l, W_l, A_l, B_l the pieces of a rank, σ folded into A, T tokens and R the ranks of all its projections together:

| base | forward | backward |
|---|---|---|
| column-parallel | y_l = x W_lᵀ + s B_lᵀ, s = x Aᵀ | d_l = dy_l B_l, dx = Σ_l (dy_l W_l + d_l A), dB_l = dy_lᵀ s, dA = Σ_l d_lᵀ x |
| row-parallel | y = Σ_l (x_l W_lᵀ + p_l Bᵀ), p_l = x_l A_lᵀ | d = dy B, dx_l = dy W_l + d A_l, dA_l = dᵀ x_l, dB = dyᵀ Σ_l p_l |

The sums over y and dx are the base's own collectives, into which the low-rank term goes. What is left is of size T x R:

| base | without sequence parallelism | with it |
|---|---|---|
| column-parallel | all-reduce of d in backward | reduce-scatter of d in backward; dA is its part of a sum over the sequence |
| row-parallel | all-reduce of p in backward | none; dB is its part of a sum over the ranks |

Megatron's finalize step completes those partial sums (the parameters say ``sequence_parallel``); the others are complete here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mlora.dropout import Dropout
from parallel import collectives
from parallel.layout import LinearLayout


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
        replicated: every rank of the group holds the whole of W.
    """

    row_parallel: bool
    sequence_parallel: bool
    group: dist.ProcessGroup
    reduce_dx: bool
    first_feature: int
    dropout: Dropout | None
    replicated: bool = False

    @classmethod
    def of(cls, layout: LinearLayout, dropout: Dropout | None, reduce_dx: bool = True) -> "Geometry":
        """What a linear's record says."""
        return cls(
            row_parallel=layout.partition_dim == 1,
            sequence_parallel=layout.sequence_parallel,
            group=layout.group,
            reduce_dx=reduce_dx,
            first_feature=layout.columns[0],
            dropout=dropout,
            replicated=layout.partition_dim is None,
        )

    @property
    def gathers(self) -> bool:
        """The input is this rank's piece of the sequence and the linear works on the whole of it."""
        return self.sequence_parallel and not self.row_parallel and not self.replicated

    def first_token(self, tokens: int) -> int:
        """Of an input of ``tokens`` tokens on this rank: the number of the first one in the whole sequence."""
        return self.group.rank() * tokens if self.sequence_parallel and not self.row_parallel else 0


class LoraLinear(torch.autograd.Function):
    """``y = x Wᵀ + bias + dropout(x) Aᵀ Bᵀ`` with W and the bias frozen; see the module's text.

    The low-rank term comes first and the product with W is added into it, in forward and in backward: that saves a pass over
    the large tensor, and a temporary of its size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        geometry: Geometry,
    ) -> torch.Tensor:
        """x [s, b, in_l] ([s/t, b, in] if it gathers), weight [out_l, in_l], lora_A [R, in_l], lora_B [out_l, R] -> [s, b, out_l].

        Raises:
            RuntimeError: the weight or the bias requires a gradient, which it would not get.
        """
        _, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        if needs_weight or needs_bias:
            raise RuntimeError("an adapted linear gives its base no gradient: its weight and bias must stay frozen")
        whole = collectives.all_gather(x, geometry.group) if geometry.gathers else x
        dropped = geometry.dropout(whole, first_feature=geometry.first_feature) if geometry.dropout else whole
        low = torch.nn.functional.linear(flat_tokens(dropped).to(lora_A.dtype), lora_A)
        term = torch.nn.functional.linear(low, lora_B)
        y = add_product(term if bias is None else term.add_(bias), flat_tokens(whole), weight.T)
        ctx.save_for_backward(x if needs_A else None, weight, lora_A, lora_B, low if needs_B else None)
        ctx.geometry, ctx.autocast = geometry, autocast_now(x.device.type)
        return in_shape(y, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dy [s, b, out_l] -> the gradients of x, lora_A and lora_B."""
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        with torch.autocast(**ctx.autocast):
            d = flat_tokens(dy).to(lora_B.dtype) @ lora_B
            dx = input_gradient(dy, weight, d @ lora_A, geometry) if needs_x else None
            dA = gradient_of_A(x, d, geometry) if needs_A else None
            dB = gradient_of_B(dy, low, geometry) if needs_B else None
        return dx, None, None, dA, dB, None


def input_gradient(dy: torch.Tensor, weight: torch.Tensor, low_dx: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """dy W and, behind the dropout mask, ``low_dx`` [T, in_l] (consumed), summed as the base sums its input gradient."""
    if geometry.dropout:
        shaped = low_dx.view(*dy.shape[:-1], low_dx.shape[-1])
        low_dx = flat_tokens(geometry.dropout(shaped, first_feature=geometry.first_feature))
    dx = add_product(low_dx, flat_tokens(dy), weight)
    if geometry.gathers:
        dx = collectives.reduce_scatter(dx, geometry.group)
    elif geometry.reduce_dx:
        dx = collectives.all_reduce_(dx, geometry.group)
    return dx.view(-1, *dy.shape[1:-1], dx.shape[-1])


def gradient_of_A(x: torch.Tensor, d: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """dᵀ dropout(x), from x [s, b, in_l] as the linear got it and d [T, R] of this rank's output rows."""
    if geometry.gathers:
        d = collectives.reduce_scatter(d, geometry.group)
    elif not geometry.row_parallel:
        d = collectives.all_reduce(d, geometry.group)
    if geometry.dropout:
        x = geometry.dropout(x, first_token=geometry.first_token(x.shape[0]), first_feature=geometry.first_feature)
    return d.T @ flat_tokens(x).to(d.dtype)


def gradient_of_B(dy: torch.Tensor, low: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """dyᵀ s, from dy [s, b, out_l] and this rank's ``low`` [T, R]."""
    if geometry.row_parallel and not geometry.sequence_parallel:
        low = collectives.all_reduce(low, geometry.group)
    return flat_tokens(dy).to(low.dtype).T @ low


def flat_tokens(x: torch.Tensor) -> torch.Tensor:
    """[s, b, n] -> [s·b, n], sequence first: the order that is gathered and scattered."""
    return x.reshape(-1, x.shape[-1])


def in_shape(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [T, n] as [s, b, n], x being [s, b, m]. To autograd it is no view: Megatron's loss works in the place of the logits."""
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return shaped


def add_product(term: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``term + left right`` in the product's dtype; ``term`` [T, n] is consumed, left [T, m], right [m, n]."""
    if term.dtype == left.dtype == right.dtype:
        return term.addmm_(left, right)
    return (left @ right).add_(term)


def autocast_now(device: str) -> dict[str, Any]:
    """What ``torch.autocast`` is told now, for backward: the engine runs that outside of the caller's context."""
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}
