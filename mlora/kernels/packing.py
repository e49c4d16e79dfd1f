"""Second stage of the gradients: add the partial sums up and lay the result out as the parameters lie.

A's gradient is scaled row by row with σ (which the kernels find folded into A). B's is transposed and taken apart: a fused row of
projection p keeps only the columns of p's own ranks and goes to its place in p's matrix.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_A(partial, scaling, out, splits, elements, features, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    valid = at < elements
    total = tl.zeros((block,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * elements + at, mask=valid, other=0.0)
    total *= tl.load(scaling + at // features, mask=valid, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)


def sum_A(partial: torch.Tensor, scaling: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scaling[r] · Σ_i partial[i, r, n]``: [splits, R, N] float32, [R] float32 -> [R, N]."""
    splits, ranks, features = partial.shape
    out = torch.empty(ranks, features, dtype=dtype, device=partial.device)
    block = 1024
    _sum_A[(triton.cdiv(out.numel(), block),)](partial, scaling, out, splits, out.numel(), features, block=block)
    return out


@triton.jit
def _sum_B(partial, offset, start, count, out, splits, ranks, rows, block_n: tl.constexpr, block_r: tl.constexpr):
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rank = tl.program_id(1) * block_r + tl.arange(0, block_r)
    inside = row < rows
    first = tl.load(start + row, mask=inside, other=0)[None, :]
    own = rank[:, None] - first
    valid = inside[None, :] & (own >= 0) & (own < tl.load(count + row, mask=inside, other=0)[None, :])
    total = tl.zeros((block_r, block_n), tl.float32)
    for split in range(splits):
        at = (split * ranks + rank[:, None]) * rows + row[None, :]
        total += tl.load(partial + at, mask=valid, other=0.0)
    place = tl.load(offset + row, mask=inside, other=0)[None, :] + own
    tl.store(out + place, total.to(out.dtype.element_ty), mask=valid)


def sum_B(
    partial: torch.Tensor,
    offset: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    elements: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The projections' B gradients one behind the other, [elements], from [splits, R, rows] float32.

    Args:
        offset, start, count: int32 [rows]: of each fused row, where it goes in the result, and the first and the number of its
            ranks among the R (0 ranks: a row without an adapter).
    """
    splits, ranks, rows = partial.shape
    out = torch.empty(elements, dtype=dtype, device=partial.device)
    block_n, block_r = 64, 16
    grid = (triton.cdiv(rows, block_n), triton.cdiv(ranks, block_r))
    _sum_B[grid](partial, offset, start, count, out, splits, ranks, rows, block_n=block_n, block_r=block_r)
    return out
