"""The low-rank term beside a linear that does its own collectives, such as Transformer Engine's: a tensor to add to its output.

:mod:`mlora.linear` puts the term inside the base's own collectives. Where the base is a closed kernel (FP8, a fused norm, its
communication overlapped) the term is computed beside it. With the names of that module:

| base | forward | backward |
|---|---|---|
| column-parallel | s = x Aᵀ, z_l = s B_lᵀ | d = Σ_l dz_l B_l, dx = d A, dA = dᵀ x, dB_l = dz_lᵀ s |
| row-parallel | s = Σ_l x_l A_lᵀ, z = s Bᵀ | d = dz B, dx_l = d A_l, dA_l = dᵀ x_l, dB = dzᵀ s |
| replicated | s = x Aᵀ, z = s Bᵀ | d = dz B, dx = d A, dA = dᵀ x, dB = dzᵀ s |

Unlike there, dx is complete on every rank, as the base's own is, and every collective is of size T x R:

| base | without sequence parallelism | with it |
|---|---|---|
| column-parallel | all-reduce of d | all-gather of s, reduce-scatter of d |
| row-parallel | all-reduce of s | reduce-scatter of s, all-gather of d |

With sequence parallelism the gradients of the replicated factors are partial sums, which Megatron's finalize step completes.
"""

from typing import Any

import torch

from mlora.linear import Geometry
from parallel import collectives


class LoraBranch(torch.autograd.Function):
    """``z = dropout(x) Aᵀ Bᵀ`` over the ranks of a linear; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, geometry: Geometry
    ) -> torch.Tensor:
        """x [s, b, in_l] ([s/t, b, in] before a column-parallel base with sequence parallelism), lora_A [R, in_l],
        lora_B [out_l, R] -> the term [s, b, out_l] in the base's output's layout."""
        low = torch.nn.functional.linear(_dropped(x, geometry).to(lora_A.dtype), lora_A)
        if geometry.row_parallel:
            scatter = collectives.reduce_scatter if geometry.sequence_parallel else collectives.all_reduce
            low = scatter(low, geometry.group)
        elif geometry.gathers:
            low = collectives.all_gather(low, geometry.group)
        ctx.save_for_backward(x, lora_A, lora_B, low)
        ctx.geometry = geometry
        return torch.nn.functional.linear(low, lora_B)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dz in the layout of the term -> the gradients of x, lora_A and lora_B."""
        x, lora_A, lora_B, low = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
        dz = dz.to(lora_B.dtype)
        d = _whole_d(dz @ lora_B, geometry) if needs_x or needs_A else None
        dx = dA = None
        if d is not None and needs_x:
            dx = _dropped(d @ lora_A, geometry).to(x.dtype)
        if d is not None and needs_A:
            dA = d.flatten(0, 1).T @ _dropped(x, geometry).to(d.dtype).flatten(0, 1)
        dB = dz.flatten(0, 1).T @ low.flatten(0, 1) if needs_B else None
        return dx, dA, dB, None


def _whole_d(d: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of ``x Aᵀ`` for the tokens of this rank's x."""
    if geometry.row_parallel:
        return collectives.all_gather(d, geometry.group) if geometry.sequence_parallel else d
    if geometry.replicated:
        return d
    return (collectives.reduce_scatter if geometry.gathers else collectives.all_reduce)(d, geometry.group)


def _dropped(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    if geometry.dropout is None:
        return x
    return geometry.dropout(x, first_token=geometry.first_token(x.shape[0]), first_feature=geometry.first_feature)
