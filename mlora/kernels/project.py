"""``[v | v Aᵀ]``, where v is the input, its RMS norm, or its SwiGLU: the operand of the GEMM with ``[W | B]``.

| kind | v | reads | writes |
|---|---|---|---|
| COPY | x | T·N | T·(N + p) |
| RMSNORM | x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps) | T·N twice | T·(N + p), T |
| SWIGLU | silu(g) · u, [g, u] = x | 2·T·N | T·(N + p) |

The low-rank columns cost no pass of their own over v. A program makes a tile of rows over a run of columns, and the runs' shares of
``v Aᵀ`` are added up by a second, small kernel: with one program a row tile there are too few of them to keep the memory busy.
With dropout, the columns are of the dropped v.
"""

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask, dropped
from mlora.kernels.tile import Tile

COPY, RMSNORM, SWIGLU = 0, 1, 2


@triton.jit
def _rstd(x, out, tokens, features: tl.constexpr, stride: tl.constexpr, eps: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * 2 + tl.arange(0, 2)
    squares = tl.zeros((2, block), tl.float32)
    for start in range(0, features, block):
        column = start + tl.arange(0, block)[None, :]
        valid = (row[:, None] < tokens) & (column < features)
        v = tl.load(x + row.to(tl.int64)[:, None] * stride + column, mask=valid, other=0.0).to(tl.float32)
        squares += v * v
    tl.store(out + row, tl.rsqrt(tl.sum(squares, 1) / features + eps), mask=row < tokens)


@triton.jit
def _project(
    x,
    norm_weight,
    rstd,
    lora_A,
    out,
    partial,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    tail: tl.constexpr,
    x_stride: tl.constexpr,
    run,
    kind: tl.constexpr,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    row = tl.program_id(0) * block_t + tl.arange(0, block_t)
    split = tl.program_id(1)
    inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
    rank = tl.arange(0, block_r)
    factor = tl.zeros((block_t,), tl.float32)
    if kind == 1:
        factor = tl.load(rstd + row, mask=row < tokens, other=0.0)
    low = tl.zeros((block_t, block_r), tl.float32)
    for start in range(0, run, block_n):
        column = split * run + start + tl.arange(0, block_n)
        valid = inside & (column[None, :] < features)
        v = tl.load(x + base * x_stride + column[None, :], mask=valid, other=0.0)
        if kind == 1:
            scale = tl.load(norm_weight + column, mask=column < features, other=0.0).to(tl.float32)
            v = (v.to(tl.float32) * factor[:, None] * scale[None, :]).to(out.dtype.element_ty)
        if kind == 2:
            up = tl.load(x + base * x_stride + features + column[None, :], mask=valid, other=0.0)
            gate = v.to(tl.float32)
            v = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + base * (features + tail) + column[None, :], v, mask=valid)
        if dropout:
            v = dropped(v, row, column, mask).to(out.dtype.element_ty)
        a_valid = (rank[None, :] < ranks) & (column[:, None] < features)
        a = tl.load(lora_A + rank[None, :] * features + column[:, None], mask=a_valid, other=0.0)
        low = tl.dot(v, a, low)
    at = (split.to(tl.int64) * tokens + base) * tail + rank[None, :]
    tl.store(partial + at, low, mask=inside & (rank[None, :] < tail))


@triton.jit
def _join(partial, low, out, tokens, splits, features: tl.constexpr, tail: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    valid = at < tokens * tail
    total = tl.zeros((block,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * tokens * tail + at, mask=valid, other=0.0)
    total = total.to(out.dtype.element_ty)
    tl.store(low + at, total, mask=valid)
    tl.store(out + (at // tail) * (features + tail) + features + at % tail, total, mask=valid)


def _tile(kind: int, block_r: int) -> tuple[Tile, int]:
    """(tile, about how many programs), as measured best on an H200."""
    if block_r > 256:
        return Tile(64, 64, 8, 2), 264
    if kind == SWIGLU:
        return Tile(64, 64, 4, 2), 528
    if kind == COPY:
        return Tile(64, 128, 4, 4), 264
    return (Tile(64, 64, 4, 4) if block_r <= 64 else Tile(128, 64, 8, 4)), 264


def project(
    x: torch.Tensor,
    lora_A: torch.Tensor,
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
        lora_A: [R, N] with the scaling in it.
        tail: p, at least R; the columns past R are zero.
        norm_weight: [N], for RMSNORM.
        mask: of dropout; None for none.
    """
    tokens, features = x.shape[0], x.shape[1] // (2 if kind == SWIGLU else 1)
    out, low = x.new_empty(tokens, features + tail), x.new_empty(tokens, tail)
    rstd = torch.empty(tokens if kind == RMSNORM else 0, dtype=torch.float32, device=x.device)
    if kind == RMSNORM:
        block = min(4096, triton.next_power_of_2(features))
        _rstd[(triton.cdiv(tokens, 2),)](x, rstd, tokens, features, x.stride(0), eps, block=block)
    block_r = max(16, triton.next_power_of_2(tail))
    tile, programs = _tile(kind, block_r)
    rows = triton.cdiv(tokens, tile.tokens)
    splits = max(1, min(programs // rows, features // (4 * tile.features)))
    run = triton.cdiv(triton.cdiv(features, splits), tile.features) * tile.features
    splits = triton.cdiv(features, run)
    partial = torch.empty(splits, tokens, tail, dtype=torch.float32, device=x.device)
    _project[(rows, splits)](
        x,
        norm_weight,
        rstd,
        lora_A,
        out,
        partial,
        tokens,
        features,
        lora_A.shape[0],
        tail,
        x.stride(0),
        run,
        kind,
        (mask or Mask.none()).arguments(),
        dropout=mask is not None,
        block_t=tile.tokens,
        block_n=tile.features,
        block_r=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _join[(triton.cdiv(tokens * tail, 1024),)](partial, low, out, tokens, splits, features, tail, block=1024)
    return out, low, rstd
