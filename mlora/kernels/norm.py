"""Backward of the RMS norm in front of a linear: v = x̂ · w, x̂ = x · rstd, from ``[g | d]`` = dy ``[W | B]``, one GEMM's result.

| function | returns, with dv = g + d A |
|---|---|
| norm_products | dᵀ dropout(x̂), which is dA but for w, and Σ dv · v of each token |
| norm_gradient | dx = rstd · (dv · w - x̂ · mean(dv · v)) |
"""

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask, keep_scale, kept
from mlora.kernels.products import BLOCK_R, block_of, dense_token_product, is_dense, low_rank_product
from mlora.kernels.tile import Tile, cdiv, rank_block


@triton.jit
def _norm_products(
    g,
    x,
    norm_weight,
    rstd,
    dA,
    correlation,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    tail: tl.constexpr,
    x_stride: tl.constexpr,
    tokens_per_split,
    correlate: tl.constexpr,
    dense: tl.constexpr,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    columns, split = tl.program_id(0), tl.program_id(1)
    column = columns * block_n + tl.arange(0, block_n)
    rank = tl.arange(0, block_r)
    scale = tl.load(norm_weight + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
    if not dense:
        total = tl.zeros((block_r, block_n), tl.float32)
    begin = split * tokens_per_split
    for start in range(begin, begin + tokens_per_split, block_t):
        row = start + tl.arange(0, block_t)
        inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
        valid = inside & (column[None, :] < features)
        factor = tl.load(rstd + row, mask=row < tokens, other=0.0)[:, None]
        xhat = tl.load(x + base * x_stride + column[None, :], mask=valid, other=0.0).to(tl.float32) * factor
        if correlate:
            dv = tl.load(g + base * (features + tail) + column[None, :], mask=valid, other=0.0).to(tl.float32)
            tl.store(correlation + columns * tokens + row, tl.sum(dv * xhat * scale, 1), mask=row < tokens)
        if not dense:
            if dropout:
                xhat = tl.where(kept(row, column, mask), xhat, 0.0)
            # Loaded as the product wants it: a transposition in registers costs more than the product.
            d_at = row.to(tl.int64)[None, :] * (features + tail) + features + rank[:, None]
            d_t = tl.load(g + d_at, mask=(row[None, :] < tokens) & (rank[:, None] < ranks), other=0.0)
            total = tl.dot(d_t, xhat.to(x.dtype.element_ty), total)
    if not dense:
        if dropout:
            total *= keep_scale(mask)
        at = (split * ranks + rank[:, None]) * features + column[None, :]
        tl.store(dA + at, total, mask=(rank[:, None] < ranks) & (column[None, :] < features))


@triton.jit
def _correlation(
    parts,
    g,
    low,
    out,
    tokens,
    columns,
    features: tl.constexpr,
    ranks: tl.constexpr,
    tail: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
    block_r: tl.constexpr,
):
    row = tl.program_id(0) * block_t + tl.arange(0, block_t)
    inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
    total = tl.zeros((block_t,), tl.float32)
    # Σ dv · v = Σ g · v + d · s, because (d A) · v = d · (v Aᵀ).
    for start in range(0, ranks, block_r):
        rank = start + tl.arange(0, block_r)
        valid = inside & (rank[None, :] < ranks)
        d = tl.load(g + base * (features + tail) + features + rank[None, :], mask=valid, other=0.0).to(tl.float32)
        s = tl.load(low + base * tail + rank[None, :], mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(d * s, 1)
    for start in range(0, columns, block_c):
        column = start + tl.arange(0, block_c)
        valid_parts = (column[:, None] < columns) & (row[None, :] < tokens)
        total += tl.sum(tl.load(parts + column[:, None] * tokens + row[None, :], mask=valid_parts, other=0.0), 0)
    tl.store(out + row, total, mask=row < tokens)


@triton.jit
def _norm_gradient(
    g,
    x,
    norm_weight,
    rstd,
    lora_A,
    correlation,
    out,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    tail: tl.constexpr,
    x_stride: tl.constexpr,
    A_stride: tl.constexpr,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    row = tl.program_id(0) * block_t + tl.arange(0, block_t)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
    valid = inside & (column[None, :] < features)
    factor = tl.load(rstd + row, mask=row < tokens, other=0.0)[:, None]
    mean = tl.load(correlation + row, mask=row < tokens, other=0.0)[:, None] / features
    product = low_rank_product(
        g + features, features + tail, row, tokens, lora_A, A_stride, column, features, ranks, block_t, block_n, block_r
    )
    if dropout:
        product = tl.where(kept(row, column, mask), product * keep_scale(mask), 0.0)
    dv = tl.load(g + base * (features + tail) + column[None, :], mask=valid, other=0.0).to(tl.float32) + product
    scale = tl.load(norm_weight + column, mask=column < features, other=0.0).to(tl.float32)[None, :]
    xhat = tl.load(x + base * x_stride + column[None, :], mask=valid, other=0.0).to(tl.float32) * factor
    dx = factor * (dv * scale - xhat * mean)
    tl.store(out + base * features + column[None, :], dx.to(out.dtype.element_ty), mask=valid)


def norm_products(
    g: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    rstd: torch.Tensor,
    low: torch.Tensor,
    ranks: int,
    mask: Mask | None = None,
    correlation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(partial sums of ``dᵀ dropout(x̂)`` [splits, R, N], dv · v of each token [T] float32) from ``[g | d]`` [T, N + p].

    Args:
        low: s [T, p], as :func:`mlora.kernels.operand.make_operand` gave it.
        correlation: dv · v where it is known already; then only d is read of g.
    """
    tokens, features = x.shape
    dense = is_dense(ranks, mask)
    block_r = rank_block(ranks)
    if dense:
        tile, resident = Tile(64, 128, 8, 3), 4
    elif block_r > 64:
        tile, resident = Tile(64, 128, 8, 2), 1
    else:
        tile, resident = (
            (Tile(64, 128, 4, 3), 2) if mask is None or correlation is not None else (Tile(64, 64, 4, 2), 4)
        )
    columns = cdiv(features, tile.features)
    summed = 0 if dense else ranks * 2 if correlation is None else ranks * 4
    splits, per_split = tile.splits(tokens, columns, resident, summed)
    dA = torch.empty(splits if not dense else 0, ranks, features, dtype=torch.float32, device=g.device)
    parts = torch.empty(columns if correlation is None else 0, tokens, dtype=torch.float32, device=g.device)
    if not dense or correlation is None:
        _norm_products[(columns, splits)](
            g,
            x,
            norm_weight,
            rstd,
            dA,
            parts,
            tokens,
            features,
            ranks,
            g.shape[1] - features,
            x.stride(0),
            per_split,
            correlation is None,
            dense,
            (mask or Mask.none()).arguments(),
            dropout=mask is not None,
            block_r=block_r,
            **tile.options,
        )
    if dense:
        # dᵀ (x · rstd) = (d · rstd)ᵀ x, so that nothing is as large as x but x. In float16, whose range is small, x is scaled.
        d = g[:, features : features + ranks]
        if x.dtype == torch.float16:
            x = torch.mul(x, rstd[:, None], out=torch.empty_like(x))
        else:
            d = torch.mul(d, rstd[:, None], out=x.new_empty(tokens, ranks))
        dA = dense_token_product(d, x, mask)
    if correlation is None:
        correlation = torch.empty(tokens, dtype=torch.float32, device=g.device)
        _correlation[(cdiv(tokens, 32),)](
            parts,
            g,
            low,
            correlation,
            tokens,
            columns,
            features,
            ranks,
            g.shape[1] - features,
            block_t=32,
            block_c=32,
            block_r=block_of(ranks),
            num_warps=4,
        )
    return dA, correlation


def norm_gradient(
    g: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    rstd: torch.Tensor,
    lora_A: torch.Tensor,
    correlation: torch.Tensor,
    mask: Mask | None = None,
) -> torch.Tensor:
    """The gradient of x [T, N] from ``[g | d]`` [T, N + p]; the norm's weight is frozen.

    Args:
        correlation: dv · v of each token [T], float32.
    """
    tokens, features = x.shape
    ranks = lora_A.shape[0]
    out = g.new_empty(tokens, features)
    tile = Tile(64, 64, 4, 1) if ranks <= BLOCK_R else Tile(64, 128, 4, 3)
    _norm_gradient[(cdiv(tokens, tile.tokens), cdiv(features, tile.features))](
        g,
        x,
        norm_weight,
        rstd,
        lora_A,
        correlation,
        out,
        tokens,
        features,
        ranks,
        g.shape[1] - features,
        x.stride(0),
        lora_A.stride(0),
        (mask or Mask.none()).arguments(),
        dropout=mask is not None,
        block_r=block_of(ranks),
        **tile.options,
    )
    return out
