"""Products of a wide operand [T, N] with a low-rank one, one pass over the wide operand each.

| function | result | for |
|---|---|---|
| token_product | ``Σ_t low[t] ⊗ v[t]``, in two stages: over a run of tokens, and over the runs | the gradients of A and B |
| dropped_product | ``v Aᵀ``, of the dropped v | the low-rank columns under dropout |
| add_low_rank | ``g + d A``, where ``[g \\| d]`` = dy ``[W \\| B]`` is one GEMM's result | the gradient of the input |

cuBLAS does the second without dropout, and both where there are many ranks: under dropout from a dropped copy.
"""

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask, keep_scale, kept
from mlora.kernels.tile import Tile, cdiv, rank_block

# With more, cuBLAS is faster although it needs what a kernel had at hand; and with more under dropout, a kernel's sums no longer
# fit its registers.
_MANY_RANKS, _MANY_DROPPED_RANKS = 64, 256
BLOCK_R = 64  # ranks that a tile of a product over them takes at a time
_PROGRAMS = 264  # about, of dropped_product: two for each of an H200's multiprocessors


@triton.jit
def _token_product(
    low,
    wide,
    partial,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    low_stride: tl.constexpr,
    wide_stride: tl.constexpr,
    tokens_per_split,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rank = tl.arange(0, block_r)
    split = tl.program_id(1)
    begin = split * tokens_per_split
    total = tl.zeros((block_r, block_n), tl.float32)
    for start in range(begin, begin + tokens_per_split, block_t):
        row = start + tl.arange(0, block_t)
        base = row.to(tl.int64)
        valid = (row[:, None] < tokens) & (column[None, :] < features)
        v = tl.load(wide + base[:, None] * wide_stride + column[None, :], mask=valid, other=0.0)
        if dropout:
            v = tl.where(kept(row, column, mask), v, 0.0)
        s = tl.load(
            low + base[None, :] * low_stride + rank[:, None],
            mask=(row[None, :] < tokens) & (rank[:, None] < ranks),
            other=0.0,
        )
        total = tl.dot(s, v, total)
    if dropout:
        total *= keep_scale(mask)
    at = split * ranks * features + rank[:, None] * features + column[None, :]
    tl.store(partial + at, total, mask=(rank[:, None] < ranks) & (column[None, :] < features))


def token_product(
    low: torch.Tensor,
    wide: torch.Tensor,
    ranks: int,
    *,
    mask: Mask | None = None,
) -> torch.Tensor:
    """Partial sums [splits, R, N] of ``Σ_t low[t] ⊗ wide[t]``, which :mod:`mlora.kernels.packing` adds up; float32 if several.

    Args:
        low: [T, at least R], columns contiguous.
        wide: [T, N], columns contiguous.
        mask: of dropout on wide.
    """
    if is_dense(ranks, mask):
        return dense_token_product(low[:, :ranks], wide, mask)
    tokens, features = wide.shape
    block_r = rank_block(ranks)
    if block_r > 64:
        tile, resident = Tile(64, 128, 8, 3), 1
    else:
        tile, resident = (Tile(64, 64, 4, 4), 3) if mask is None else (Tile(32, 128, 4, 3), 4)
    columns = cdiv(features, tile.features)
    splits, per_split = tile.splits(tokens, columns, resident, sums=4 * ranks)
    partial = torch.empty(splits, ranks, features, dtype=torch.float32, device=wide.device)
    _token_product[(columns, splits)](
        low,
        wide,
        partial,
        tokens,
        features,
        ranks,
        low.stride(0),
        wide.stride(0),
        per_split,
        (mask or Mask.none()).arguments(),
        dropout=mask is not None,
        block_r=block_r,
        **tile.options,
    )
    return partial


def is_dense(ranks: int, mask: Mask | None) -> bool:
    """Whether cuBLAS makes the products with so many ranks, under dropout of a dropped copy."""
    return ranks > (_MANY_RANKS if mask is None else _MANY_DROPPED_RANKS)


def dense_token_product(low: torch.Tensor, wide: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
    """``lowᵀ wide`` [1, R, N]: :func:`token_product` by cuBLAS, in one sum and in the operands' dtype."""
    return (low.T @ (wide if mask is None else _dropped_copy(wide, mask)))[None]


@triton.jit
def _drop(v, out, features, v_stride, mask, block: tl.constexpr):
    row, column = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * block + tl.arange(0, block)
    base, valid = row.to(tl.int64)[:, None], column[None, :] < features
    value = tl.load(v + base * v_stride + column[None, :], mask=valid, other=0.0)
    value = tl.where(kept(row, column, mask), value.to(tl.float32) * keep_scale(mask), 0.0)
    tl.store(out + base * features + column[None, :], value.to(out.dtype.element_ty), mask=valid)


def _dropped_copy(v: torch.Tensor, mask: Mask) -> torch.Tensor:
    (tokens, features), block = v.shape, 1024
    out = v.new_empty(tokens, features)
    _drop[(tokens, cdiv(features, block))](v, out, features, v.stride(0), mask.arguments(), block=block)
    return out


@triton.jit
def _dropped_product(
    v,
    lora_A,
    partial,
    tokens,
    features: tl.constexpr,
    tail: tl.constexpr,
    v_stride: tl.constexpr,
    A_stride: tl.constexpr,
    run,
    mask,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    row = tl.program_id(0) * block_t + tl.arange(0, block_t)
    split = tl.program_id(1)
    inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
    rank = tl.arange(0, block_r)
    low = tl.zeros((block_t, block_r), tl.float32)
    for start in range(0, run, block_n):
        column = split * run + start + tl.arange(0, block_n)
        wide = tl.load(v + base * v_stride + column[None, :], mask=inside & (column[None, :] < features), other=0.0)
        wide = tl.where(kept(row, column, mask), wide, 0.0)
        a_valid = (rank[None, :] < tail) & (column[:, None] < features)
        a = tl.load(lora_A + rank[None, :] * A_stride + column[:, None], mask=a_valid, other=0.0)
        low = tl.dot(wide, a, low)
    at = (split.to(tl.int64) * tokens + base) * tail + rank[None, :]
    tl.store(partial + at, low * keep_scale(mask), mask=inside & (rank[None, :] < tail))


def dropped_product(v: torch.Tensor, lora_A: torch.Tensor, mask: Mask) -> torch.Tensor:
    """``dropout(v) Aᵀ`` [T, p] of v [T, N], columns contiguous, and A [p, N]."""
    (tokens, features), tail = v.shape, lora_A.shape[0]
    if is_dense(tail, mask):
        return _dropped_copy(v, mask) @ lora_A.T
    block_r = rank_block(tail)
    tile = Tile(64, 128, 4, 3) if block_r <= 64 else Tile(64, 64, 8, 2)
    rows = cdiv(tokens, tile.tokens)
    splits = max(1, min(_PROGRAMS // rows, features // (4 * tile.features)))
    run = cdiv(cdiv(features, splits), tile.features) * tile.features
    splits = cdiv(features, run)
    partial = torch.empty(splits, tokens, tail, dtype=torch.float32, device=v.device)
    _dropped_product[(rows, splits)](
        v,
        lora_A,
        partial,
        tokens,
        features,
        tail,
        v.stride(0),
        lora_A.stride(0),
        run,
        mask.arguments(),
        block_r=block_r,
        **tile.options,
    )
    return partial.sum(0).to(v.dtype)


@triton.jit
def low_rank_product(
    d,
    d_stride: tl.constexpr,
    row,
    tokens,
    lora_A,
    A_stride: tl.constexpr,
    column,
    features: tl.constexpr,
    ranks: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    # d A of a tile, in float32.
    inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
    total = tl.zeros((block_t, block_n), tl.float32)
    for start in range(0, ranks, block_r):
        rank = start + tl.arange(0, block_r)
        low = tl.load(d + base * d_stride + rank[None, :], mask=inside & (rank[None, :] < ranks), other=0.0)
        a_valid = (rank[:, None] < ranks) & (column[None, :] < features)
        a = tl.load(lora_A + rank[:, None] * A_stride + column[None, :], mask=a_valid, other=0.0)
        total = tl.dot(low, a, total)
    return total


def block_of(ranks: int) -> int:
    """The ranks that :func:`low_rank_product` takes at a time."""
    return min(BLOCK_R, rank_block(ranks))


@triton.jit
def _add_low_rank(
    g,
    lora_A,
    out,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    tail: tl.constexpr,
    A_stride: tl.constexpr,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    row = tl.program_id(0) * block_t + tl.arange(0, block_t)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    low = low_rank_product(
        g + features, features + tail, row, tokens, lora_A, A_stride, column, features, ranks, block_t, block_n, block_r
    )
    if dropout:
        low = tl.where(kept(row, column, mask), low * keep_scale(mask), 0.0)
    base = row.to(tl.int64)[:, None]
    valid = (row[:, None] < tokens) & (column[None, :] < features)
    v = tl.load(g + base * (features + tail) + column[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(out + base * features + column[None, :], (v + low).to(out.dtype.element_ty), mask=valid)


def add_low_rank(g: torch.Tensor, lora_A: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
    """``g[:, :N] + g[:, N : N + R] A``, contiguous [T, N]; g [T, N + p], A [R, N]. Moves 2·T·N elements."""
    (tokens, width), (ranks, features) = g.shape, lora_A.shape
    out = g.new_empty(tokens, features)
    tile = Tile(64, 128, 4, 2) if ranks > BLOCK_R else Tile(64, 128, 4, 1) if mask is None else Tile(32, 128, 4, 1)
    _add_low_rank[(cdiv(tokens, tile.tokens), cdiv(features, tile.features))](
        g,
        lora_A,
        out,
        tokens,
        features,
        ranks,
        width - features,
        lora_A.stride(0),
        (mask or Mask.none()).arguments(),
        dropout=mask is not None,
        block_r=block_of(ranks),
        **tile.options,
    )
    return out
