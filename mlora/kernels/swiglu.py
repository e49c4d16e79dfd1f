"""Backward of SwiGLU between two adapted linears, with three of their low-rank products done while the tile is there.

v = silu(gate) · up is the second linear's input, y1 = [gate, up] the first one's output:

    dv = g (+ d A2),   dgate = dv · up · silu'(gate),   dup = dv · silu(gate)
    dA2 = dᵀ dropout(v),   dB1 = [dgateᵀ s_gate; dupᵀ s_up],   dy · y of each token

The last is what the norm in front of the first linear needs of its own gradient: dv · v there, for y = v (W + B A)ᵀ.
Reads 3·T·F and writes 2·T·F elements, as the plain backward does. A program owns some columns and loops over a run of tokens, so
that dA2 and dB1 stay in registers; the sums over the runs are made by :mod:`mlora.kernels.packing`.

To issue some 65 instructions an element takes an H200 as long as to move the bytes, so that each one counts here.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask, keep_scale, kept
from mlora.kernels.products import dense_token_product, low_rank_product
from mlora.kernels.tile import Tile, cdiv, rank_block

_MANY_RANKS = 128  # With more, the sums no longer fit the registers, and cuBLAS makes them from a copy of v.


def _tile(ranks: int, dropout: bool) -> tuple[Tile, int]:
    """The tile, and of how many programs the registers of a multiprocessor are full; measured best on an H200."""
    if ranks > _MANY_RANKS:
        return Tile(32, 64, 4, 2), 7
    if dropout:
        return (Tile(32, 64, 4, 3), 2) if ranks <= 32 else (Tile(32, 64, 8, 2), 1)
    return (Tile(32, 64, 4, 4), 2) if 32 < ranks <= 64 else (Tile(32, 128, 8, 3), 2 if ranks <= 32 else 1)


@triton.jit
def sigmoid(x):
    """Of a float32 tile: by a root, because a division takes several instructions more."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # -log2(e)
    return root * root


@triton.jit
def _swiglu_backward(
    g,
    d,
    y,
    lora_A,
    low,
    out,
    dA,
    dB,
    activated,
    correlation,
    tokens,
    features: tl.constexpr,
    ranks: tl.constexpr,
    g_stride: tl.constexpr,
    d_stride: tl.constexpr,
    A_stride: tl.constexpr,
    low_ranks: tl.constexpr,
    gate_first: tl.constexpr,
    gate_ranks: tl.constexpr,
    up_first: tl.constexpr,
    up_ranks: tl.constexpr,
    low_tail: tl.constexpr,
    tokens_per_split,
    complete: tl.constexpr,
    dense: tl.constexpr,
    mask,
    dropout: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    block_s: tl.constexpr,
):
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    split = tl.program_id(1)
    rank, low_rank = tl.arange(0, block_r), tl.arange(0, block_s)
    inside_n = column < features
    if not (complete or dense):
        a_valid = (rank[:, None] < ranks) & inside_n[None, :]
        a = tl.load(lora_A + rank[:, None] * A_stride + column[None, :], mask=a_valid, other=0.0)
    if not dense:
        total_A = tl.zeros((block_r, block_n), tl.float32)
        total_gate = tl.zeros((block_s, block_n), tl.float32)
        total_up = tl.zeros((block_s, block_n), tl.float32)
    begin = split * tokens_per_split
    for start in range(begin, begin + tokens_per_split, block_t):
        row = start + tl.arange(0, block_t)
        inside, base = row[:, None] < tokens, row.to(tl.int64)[:, None]
        valid = inside & inside_n[None, :]
        gate = tl.load(y + base * 2 * features + column[None, :], mask=valid, other=0.0).to(tl.float32)
        up = tl.load(y + base * 2 * features + features + column[None, :], mask=valid, other=0.0).to(tl.float32)
        dv = tl.load(g + base * g_stride + column[None, :], mask=valid, other=0.0).to(tl.float32)
        part = sigmoid(gate)
        silu = gate * part
        if dropout:
            is_kept = kept(row, column, mask)
        # What v and dgate share, Triton would compute twice, in the layout of the loads and in that of the products: unless it is
        # made of more than loaded values, and of the product d A where there is one.
        if complete:
            silu = tl.where(valid, silu, 0.0)
        else:
            if dense:
                product = low_rank_product(
                    d, d_stride, row, tokens, lora_A, A_stride, column, features, ranks, block_t, block_n, 64
                )
            else:
                d_valid = inside & (rank[None, :] < ranks)
                product = tl.dot(tl.load(d + base * d_stride + rank[None, :], mask=d_valid, other=0.0), a)
            silu += 0.0 * product
            if dropout:
                product = tl.where(is_kept, product * keep_scale(mask), 0.0)
            dv += product
        v = (silu * up).to(y.dtype.element_ty)
        if dropout:
            v = tl.where(is_kept, v, 0.0)
        # silu' = part · bend, and dgate · gate + dup · up = dup · up · (bend + 1).
        bend = 1.0 + gate - silu
        dup = dv * silu
        total = tl.sum(dup * up * bend + dup * up, 1)
        tl.store(correlation + tl.program_id(0) * tokens + row, total, mask=row < tokens)
        dgate = (dv * up * part * bend).to(y.dtype.element_ty)
        dup = dup.to(y.dtype.element_ty)
        tl.store(out + base * 2 * features + column[None, :], dgate, mask=valid)
        tl.store(out + base * 2 * features + features + column[None, :], dup, mask=valid)
        if dense:
            if dropout:
                v = (v.to(tl.float32) * keep_scale(mask)).to(y.dtype.element_ty)
            tl.store(activated + base * features + column[None, :], v, mask=valid)
        else:
            # Loaded as the products want them: a transposition in registers costs more than the product.
            token = row.to(tl.int64)[None, :]
            d_t_valid = (row[None, :] < tokens) & (rank[:, None] < ranks)
            d_t = tl.load(d + token * d_stride + rank[:, None], mask=d_t_valid, other=0.0)
            total_A = tl.dot(d_t, v, total_A)
            s_at, s_inside = low + token * low_tail + low_rank[:, None], row[None, :] < tokens
            s_gate = tl.load(s_at + gate_first, mask=s_inside & (low_rank[:, None] < gate_ranks), other=0.0)
            total_gate = tl.dot(s_gate, dgate, total_gate)
            s_up = tl.load(s_at + up_first, mask=s_inside & (low_rank[:, None] < up_ranks), other=0.0)
            total_up = tl.dot(s_up, dup, total_up)
    if not dense:
        if dropout:
            total_A *= keep_scale(mask)
        at = (split * ranks + rank[:, None]) * features + column[None, :]
        tl.store(dA + at, total_A, mask=(rank[:, None] < ranks) & inside_n[None, :])
        at = (split * low_ranks + low_rank[:, None]) * 2 * features + column[None, :]
        at_gate, at_up = at + gate_first * 2 * features, at + (up_first * 2 + 1) * features
        tl.store(dB + at_gate, total_gate, mask=(low_rank[:, None] < gate_ranks) & inside_n[None, :])
        tl.store(dB + at_up, total_up, mask=(low_rank[:, None] < up_ranks) & inside_n[None, :])


def swiglu_backward(
    g: torch.Tensor,
    d: torch.Tensor,
    y: torch.Tensor,
    lora_A: torch.Tensor | None,
    low: torch.Tensor,
    halves: Sequence[tuple[int, int]],
    mask: Mask | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy1 [T, 2 F], dA2 [splits, R2, F], dB1 transposed [splits, R1, 2 F], dy · y [T] float32); the middle two are partial sums.

    Of dB1 there is what ``halves`` says; the rest is not set.

    Args:
        g, d: [T, F] and [T, R2] of the second linear, columns contiguous each.
        y: y1 [T, 2 F], the first linear's output.
        lora_A: A2 [R2, F] with the scaling in it; None if d A2 is in g.
        low: s1 [T, p1] of the first linear.
        halves: (first, number) of the R1 ranks that belong to gate, and to up.
        mask: of dropout on the second linear's input.
    """
    (tokens, features), ranks = g.shape, d.shape[1]
    out = torch.empty_like(y)
    low_ranks = max(first + count for first, count in halves)
    block_r, block_s = rank_block(ranks), rank_block(max(count for _, count in halves))
    most = max(block_r, block_s)
    dense = most > _MANY_RANKS
    tile, resident = _tile(most, mask is not None)
    columns = cdiv(features, tile.features)
    # Each of its elements takes part in five moves of 2 bytes; a sum is moved twice in 4 bytes.
    summed = (ranks + sum(count for _, count in halves)) * 8 // 10 if not dense else 0
    splits, per_split = tile.splits(tokens, columns, resident, summed)
    sums = splits if not dense else 0
    dA = torch.empty(sums, ranks, features, dtype=torch.float32, device=y.device)
    dB = torch.empty(sums, low_ranks, 2 * features, dtype=torch.float32, device=y.device)
    activated = y.new_empty(tokens if dense else 0, features)
    correlation = torch.empty(columns, tokens, dtype=torch.float32, device=y.device)
    _swiglu_backward[(columns, splits)](
        g,
        d,
        y,
        lora_A,
        low,
        out,
        dA,
        dB,
        activated,
        correlation,
        tokens,
        features,
        ranks,
        g.stride(0),
        d.stride(0),
        lora_A.stride(0) if lora_A is not None else 0,
        low_ranks,
        *halves[0],
        *halves[1],
        low.shape[1],
        per_split,
        lora_A is None,
        dense,
        (mask or Mask.none()).arguments(),
        dropout=mask is not None,
        block_r=block_r,
        block_s=block_s,
        **tile.options,
    )
    if dense:
        dA = dense_token_product(d, activated)
        dB = out.new_empty(1, low_ranks, 2 * features)
        for (first, count), column in zip(halves, (0, features), strict=True):
            rank, half = slice(first, first + count), slice(column, column + features)
            torch.mm(low[:, rank].T, out[:, half], out=dB[0, rank, half])
    return out, dA, dB, correlation.sum(0)
