"""``lowᵀ v`` summed over the tokens: the gradients of A and B, one pass over the wide operand.

Stage one sums over a run of tokens in float32, stage two over the runs.
"""

import torch
import triton
import triton.language as tl

from mlora.kernels.mask import Mask, dropped
from mlora.kernels.tile import Tile

_PROGRAMS = 264  # about; two for each of an H200's multiprocessors


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
            v = dropped(v, row, column, mask).to(wide.dtype.element_ty)
        s = tl.load(
            low + base[None, :] * low_stride + rank[:, None],
            mask=(row[None, :] < tokens) & (rank[:, None] < ranks),
            other=0.0,
        )
        total = tl.dot(s, v, total)
    at = split * ranks * features + rank[:, None] * features + column[None, :]
    tl.store(partial + at, total, mask=(rank[:, None] < ranks) & (column[None, :] < features))


def token_product(
    low: torch.Tensor,
    wide: torch.Tensor,
    ranks: int,
    *,
    mask: Mask | None = None,
) -> torch.Tensor:
    """Partial sums float32 [splits, R, N] of ``Σ_t low[t] ⊗ wide[t]``; :mod:`mlora.kernels.packing` adds them up.

    Args:
        low: [T, at least R], columns contiguous.
        wide: [T, N], columns contiguous.
        mask: of dropout on wide.
    """
    tokens, features = wide.shape
    block_r = max(16, triton.next_power_of_2(ranks))
    tile = Tile(64, 64, 4, 4) if block_r <= 64 else Tile(64, 128, 8, 3) if block_r <= 256 else Tile(64, 64, 8, 3)
    columns = triton.cdiv(features, tile.features)
    splits, per_split = tile.splits(tokens, columns, _PROGRAMS)
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
        block_t=tile.tokens,
        block_n=tile.features,
        block_r=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partial
