"""``[v | v Aᵀ]``, where v is the input, its RMS norm, or its SwiGLU: the operand of the GEMM with ``[W | B]``.

| kind | v | reads | writes |
|---|---|---|---|
| COPY | x | T·N | T·N |
| RMSNORM | x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps) | T·N | T·N, T |
| SWIGLU | silu(g) · u, [g, u] = x | 2·T·N | T·N |

One pass makes v, a program a row or a part of one, and a skinny GEMM reads it again for ``v Aᵀ``. On an H200 these two take less
time together than one kernel that does both: what it saves in bytes, it loses in the layouts that the matrix units ask for.
"""

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask
from mlora.kernels.products import dropped_product
from mlora.kernels.swiglu import sigmoid
from mlora.kernels.tile import cdiv, power_of_2

COPY, RMSNORM, SWIGLU = 0, 1, 2


@triton.jit
def _operand(
    x,
    norm_weight,
    rstd,
    out,
    features: tl.constexpr,
    x_stride: tl.constexpr,
    out_stride: tl.constexpr,
    eps: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if kind == 1:
        squares = tl.zeros((block,), tl.float32)
        for start in range(0, features, block):
            column = start + tl.arange(0, block)
            v = tl.load(x + row * x_stride + column, mask=column < features, other=0.0).to(tl.float32)
            squares += v * v
        factor = tl.rsqrt(tl.sum(squares) / features + eps)
        tl.store(rstd + row, factor)
        for start in range(0, features, block):
            column = start + tl.arange(0, block)
            valid = column < features
            v = tl.load(x + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
            v = v * factor * tl.load(norm_weight + column, mask=valid, other=0.0).to(tl.float32)
            tl.store(out + row * out_stride + column, v.to(out.dtype.element_ty), mask=valid)
    else:
        column = tl.program_id(1) * block + tl.arange(0, block)
        valid = column < features
        v = tl.load(x + row * x_stride + column, mask=valid, other=0.0)
        if kind == 2:
            up = tl.load(x + row * x_stride + features + column, mask=valid, other=0.0)
            gate = v.to(tl.float32)
            v = (gate * sigmoid(gate) * up.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, v, mask=valid)


def make_operand(
    x: torch.Tensor,
    lora_A: torch.Tensor | None,
    tail: int,
    *,
    kind: int = COPY,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    mask: Mask | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(``[v | v Aᵀ]`` [T, N + p], v Aᵀ [T, p], rstd [T] float32).

    Args:
        x: [T, N] ([T, 2 N] for SWIGLU), columns contiguous.
        lora_A: [p, N] with the scaling in it, zero past the R ranks; None for none.
        tail: p; without A, these columns are not set.
        norm_weight: [N], for RMSNORM.
        mask: of dropout on v in ``v Aᵀ``; None for none.
    """
    tokens, features = x.shape[0], x.shape[1] // (2 if kind == SWIGLU else 1)
    out = x.new_empty(tokens, features + tail)
    rstd = torch.empty(tokens if kind == RMSNORM else 0, dtype=torch.float32, device=x.device)
    block = min(4096 if kind == RMSNORM else 2048, power_of_2(features))
    _operand[(tokens, 1 if kind == RMSNORM else cdiv(features, block))](
        x,
        norm_weight,
        rstd,
        out,
        features,
        x.stride(0),
        features + tail,
        eps,
        kind,
        block=block,
        num_warps=8 if block == 4096 else 4,
    )
    if lora_A is None:
        return out, x.new_empty(tokens, 0), rstd
    low = low_product(out[:, :features], lora_A, mask)
    out[:, features:] = low
    return out, low, rstd


def low_product(v: torch.Tensor, lora_A: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """``v Aᵀ`` [T, p], of the dropped v if there is a mask; v [T, N], A [p, N]."""
    return v @ lora_A.T if mask is None else dropped_product(v, lora_A, mask)
