"""Between the parameters, a matrix for each projection, and the buffers of a fused linear: there, and back with the gradients.

A linear fuses up to three projections with ranks ``starts[p] ...`` among the R. In the buffers, A has σ folded in row by row, and B
has a fused row's values in the columns of its own projection's ranks. The way back is also the second stage of the gradients' sums
over the tokens. Each direction is one launch a linear, whose first programs do A and whose others do B.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mlora.kernels.tile import cdiv

_BLOCK = 1024  # elements of A of a program
_BLOCK_N, _BLOCK_R = 64, 16  # rows and ranks of B
_SUM_BLOCK, _TOGETHER = 256, 4  # elements of A of a program that sums, and the loads that it has under way


@triton.jit
def _pack_A(
    program, a0, a1, a2, scaling, out, out_stride, second, third, used, elements, features, block: tl.constexpr
):
    at = program * block + tl.arange(0, block)
    valid = at < elements
    rank, column = at // features, at % features
    value = tl.load(a0 + rank * features + column, mask=valid & (rank < second), other=0.0)
    value += tl.load(
        a1 + (rank - second) * features + column, mask=valid & (rank >= second) & (rank < third), other=0.0
    )
    value += tl.load(a2 + (rank - third) * features + column, mask=valid & (rank >= third) & (rank < used), other=0.0)
    scaled = value.to(tl.float32) * tl.load(scaling + rank, mask=valid & (rank < used), other=0.0)
    tl.store(out + rank.to(tl.int64) * out_stride + column, scaled.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _pack_B(
    program,
    b0,
    b1,
    b2,
    part,
    index,
    first_column,
    count,
    out,
    out_stride,
    rows,
    ranks,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    across = tl.cdiv(ranks, block_r)
    row = program // across * block_n + tl.arange(0, block_n)
    rank = program % across * block_r + tl.arange(0, block_r)
    inside = row < rows
    which = tl.load(part + row, mask=inside, other=0)[:, None]
    own_ranks = tl.load(count + row, mask=inside, other=0)[:, None]
    own = rank[None, :] - tl.load(first_column + row, mask=inside, other=0)[:, None]
    at = tl.load(index + row, mask=inside, other=0)[:, None] * own_ranks + own
    valid = inside[:, None] & (own >= 0) & (own < own_ranks)
    value = tl.load(b0 + at, mask=valid & (which == 0), other=0.0)
    value += tl.load(b1 + at, mask=valid & (which == 1), other=0.0)
    value += tl.load(b2 + at, mask=valid & (which == 2), other=0.0)
    place = out + row[:, None].to(tl.int64) * out_stride + rank[None, :]
    tl.store(place, value, mask=inside[:, None] & (rank[None, :] < ranks))


@triton.jit
def _pack(
    a0,
    a1,
    a2,
    scaling,
    A,
    A_stride,
    second,
    third,
    used,
    elements,
    features,
    b0,
    b1,
    b2,
    part,
    index,
    first_column,
    count,
    B,
    B_stride,
    rows,
    ranks,
    block: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    program, programs_A = tl.program_id(0), tl.cdiv(elements, block)
    if program < programs_A:
        _pack_A(program, a0, a1, a2, scaling, A, A_stride, second, third, used, elements, features, block)
    else:
        program -= programs_A
        _pack_B(program, b0, b1, b2, part, index, first_column, count, B, B_stride, rows, ranks, block_n, block_r)


def pack(
    parts_A: list[torch.Tensor],
    parts_B: list[torch.Tensor],
    scaling: torch.Tensor,
    tables: "RowTables",
    A: torch.Tensor,
    B: torch.Tensor,
) -> None:
    """Fill A [p, N] with the projections' A [r, N] one below the other, times scaling [R]; and B [rows, p] from the projections' B
    [rows of theirs, r], at each row's ``tables.column``; with zeros elsewhere. Both are slices of a wider buffer."""
    ends, used = [part.shape[0] for part in parts_A], scaling.shape[0]
    second = ends[0] if len(ends) > 1 else used
    third = second + ends[1] if len(ends) > 2 else used
    programs = cdiv(A.numel(), _BLOCK)
    if parts_B:
        programs += cdiv(B.shape[0], _BLOCK_N) * cdiv(B.shape[1], _BLOCK_R)
    else:
        B.zero_()
    _pack[(programs,)](
        *_three(parts_A),
        scaling,
        A,
        A.stride(0),
        second,
        third,
        used,
        A.numel(),
        A.shape[1],
        *_three(parts_B or parts_A),
        tables.part,
        tables.index,
        tables.column,
        tables.count,
        B,
        B.stride(0),
        *B.shape,
        block=_BLOCK,
        block_n=_BLOCK_N,
        block_r=_BLOCK_R,
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
        column: where its values begin in the buffer's columns of B.
    """

    part: torch.Tensor
    index: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    offset: torch.Tensor
    column: torch.Tensor


@triton.jit
def _sum_A(
    program, partial, scaling, factor, out, splits, elements, features, block: tl.constexpr, together: tl.constexpr
):
    at = program * block + tl.arange(0, block)
    valid = at < elements
    total = tl.zeros((block,), tl.float32)
    for first in range(0, splits, together):
        for split in tl.static_range(together):
            at_split = partial + (first + split) * elements + at
            total += tl.load(at_split, mask=valid & (first + split < splits), other=0.0).to(tl.float32)
    total *= tl.load(scaling + at // features, mask=valid, other=0.0)
    if factor is not None:
        total *= tl.load(factor + at % features, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _sum_B(
    program,
    partial,
    offset,
    start,
    count,
    out,
    splits,
    ranks,
    rows,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    together: tl.constexpr,
):
    across = tl.cdiv(ranks, block_r)
    row = program // across * block_n + tl.arange(0, block_n)
    rank = program % across * block_r + tl.arange(0, block_r)
    inside = row < rows
    first = tl.load(start + row, mask=inside, other=0)[None, :]
    own = rank[:, None] - first
    valid = inside[None, :] & (own >= 0) & (own < tl.load(count + row, mask=inside, other=0)[None, :])
    total = tl.zeros((block_r, block_n), tl.float32)
    for first in range(0, splits, together):
        for split in tl.static_range(together):
            at = ((first + split) * ranks + rank[:, None]) * rows + row[None, :]
            total += tl.load(partial + at, mask=valid & (first + split < splits), other=0.0).to(tl.float32)
    place = tl.load(offset + row, mask=inside, other=0)[None, :] + own
    tl.store(out + place, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _sums(
    dA,
    scaling,
    factor,
    out_A,
    splits_A,
    elements,
    features,
    dB,
    offset,
    start,
    count,
    out_B,
    splits_B,
    ranks,
    rows,
    block: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
    together: tl.constexpr,
):
    program, programs_A = tl.program_id(0), tl.cdiv(elements, block)
    if program < programs_A:
        _sum_A(program, dA, scaling, factor, out_A, splits_A, elements, features, block, together)
    else:
        program -= programs_A
        _sum_B(program, dB, offset, start, count, out_B, splits_B, ranks, rows, block_n, block_r, together)


def sums(
    dA: torch.Tensor,
    dB: torch.Tensor,
    scaling: torch.Tensor,
    tables: RowTables,
    elements: int,
    dtype: torch.dtype,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients from partial sums over the tokens.

    Args:
        dA: [splits, R, N].
        dB: [splits, R, rows]; the splits may be others.
        scaling: [R] float32.
        elements: of all projections' B.
        dtype: of the gradients.
        factor: [N], of A's columns; None for ones.

    Returns:
        ``scaling[r] · factor[n] · Σ_i dA[i, r, n]`` [R, N], and the projections' B gradients one behind the other, [elements].
    """
    splits_A, ranks, features = dA.shape
    splits_B, _, rows = dB.shape
    out_A = torch.empty(ranks, features, dtype=dtype, device=dA.device)
    out_B = torch.empty(elements, dtype=dtype, device=dA.device)
    programs = cdiv(out_A.numel(), _SUM_BLOCK) + cdiv(rows, _BLOCK_N) * cdiv(ranks, _BLOCK_R)
    _sums[(programs,)](
        dA,
        scaling,
        factor,
        out_A,
        splits_A,
        out_A.numel(),
        features,
        dB,
        tables.offset,
        tables.start,
        tables.count,
        out_B,
        splits_B,
        ranks,
        rows,
        block=_SUM_BLOCK,
        block_n=_BLOCK_N,
        block_r=_BLOCK_R,
        together=_TOGETHER,
    )
    return out_A, out_B
