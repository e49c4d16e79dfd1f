"""Between the parameters, a matrix for each projection, and the buffers of a fused linear: there, and back with the gradients.

A linear fuses up to three projections with ranks ``starts[p] ...`` among the R. In the buffers, A has σ folded in row by row, and B
has a fused row's values in the columns of its own projection's ranks. The way back is also the second stage of the gradients' sums
over the tokens. Each direction is one launch a linear for A and one for B.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _pack_A(a0, a1, a2, scaling, out, second, third, elements, features, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    valid = at < elements
    rank, column = at // features, at % features
    value = tl.load(a0 + rank * features + column, mask=valid & (rank < second), other=0.0)
    value += tl.load(
        a1 + (rank - second) * features + column, mask=valid & (rank >= second) & (rank < third), other=0.0
    )
    value += tl.load(a2 + (rank - third) * features + column, mask=valid & (rank >= third), other=0.0)
    scaled = value.to(tl.float32) * tl.load(scaling + rank, mask=valid, other=0.0)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _pack_B(
    b0, b1, b2, part, index, start, count, out, out_stride, rows, ranks, block_n: tl.constexpr, block_r: tl.constexpr
):
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rank = tl.program_id(1) * block_r + tl.arange(0, block_r)
    inside = row < rows
    which = tl.load(part + row, mask=inside, other=0)[:, None]
    own_ranks = tl.load(count + row, mask=inside, other=0)[:, None]
    own = rank[None, :] - tl.load(start + row, mask=inside, other=0)[:, None]
    at = tl.load(index + row, mask=inside, other=0)[:, None] * own_ranks + own
    valid = inside[:, None] & (own >= 0) & (own < own_ranks)
    value = tl.load(b0 + at, mask=valid & (which == 0), other=0.0)
    value += tl.load(b1 + at, mask=valid & (which == 1), other=0.0)
    value += tl.load(b2 + at, mask=valid & (which == 2), other=0.0)
    place = out + row[:, None].to(tl.int64) * out_stride + rank[None, :]
    tl.store(place, value, mask=inside[:, None] & (rank[None, :] < ranks))


def pack_A(parts: list[torch.Tensor], scaling: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` [R, N] with the projections' A [r, N] one below the other, times scaling [R]."""
    first, second, third = _three(parts)
    ends = [part.shape[0] for part in parts]
    at_second = ends[0]
    at_third = at_second + (ends[1] if len(ends) > 1 else out.shape[0])
    grid = (triton.cdiv(out.numel(), 1024),)
    _pack_A[grid](first, second, third, scaling, out, at_second, at_third, out.numel(), out.shape[1], block=1024)


def pack_B(parts: list[torch.Tensor], tables: "RowTables", out: torch.Tensor) -> None:
    """Fill ``out`` [rows, R], a slice of a wider buffer, from the projections' B [rows of p, r]; zeros elsewhere."""
    first, second, third = _three(parts)
    rows, ranks = out.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(ranks, 16))
    _pack_B[grid](
        first,
        second,
        third,
        tables.part,
        tables.index,
        tables.start,
        tables.count,
        out,
        out.stride(0),
        rows,
        ranks,
        block_n=64,
        block_r=16,
    )


def _three(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padded = [*parts, *[parts[0]] * 2][:3]
    return padded[0], padded[1], padded[2]


@dataclass(frozen=True)
class RowTables:
    """What belongs to each fused row, int32 [rows].

    Attributes:
        part: number of its projection among those that have a B on this rank.
        index: its row in that B.
        start, count: the first and the number of its ranks among the R; a count of 0 is a row without an adapter.
        offset: where its gradient begins in the B's laid one behind the other.
    """

    part: torch.Tensor
    index: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    offset: torch.Tensor


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


def sum_B(partial: torch.Tensor, tables: RowTables, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """The projections' B gradients one behind the other, [elements], from [splits, R, rows] float32."""
    splits, ranks, rows = partial.shape
    out = torch.empty(elements, dtype=dtype, device=partial.device)
    block_n, block_r = 64, 16
    grid = (triton.cdiv(rows, block_n), triton.cdiv(ranks, block_r))
    _sum_B[grid](
        partial, tables.offset, tables.start, tables.count, out, splits, ranks, rows, block_n=block_n, block_r=block_r
    )
    return out
