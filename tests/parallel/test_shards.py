"""Cutting parts into every rank's fused weight and joining them back gives the same parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from megatron.core import parallel_state

from parallel import shards
from parallel.layout import LinearLayout
from parallel.sizes import ParallelSizes
from tests.parallel.layouts import Fused, any_linear, layouts
from tests.ranks import run_ranks


def matrices(layout: LinearLayout) -> dict[str, torch.Tensor]:
    """Parts whose every element is another number."""
    found, at = {}, 1
    for part, rows in layout.parts:
        count = rows * layout.in_features
        found[part] = torch.arange(at, at + count).view(rows, layout.in_features)
        at += count
    return found


def shard(layout: LinearLayout, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = sum(segment.length for segment in layout.segments)
    out = torch.zeros(rows, layout.columns[1], dtype=torch.int64)
    shards.cut(
        layout, lambda part, row, rows, column, count: parts[part][row : row + rows, column : column + count], out
    )
    return out


@settings(deadline=None)
@given(any_linear())
def test_cut_then_join_is_the_identity(ranks: list[LinearLayout]) -> None:
    parts = matrices(ranks[0])
    cut = [shard(layout, parts) for layout in ranks]
    assert all((piece > 0).all() for piece in cut)
    for part, whole in parts.items():
        assert torch.equal(shards.join(ranks, cut, part), whole)


@settings(deadline=None)
@given(any_linear())
def test_a_bias_is_cut_as_the_rows_are(ranks: list[LinearLayout]) -> None:
    parts = matrices(ranks[0])
    for layout in ranks:
        whole_rows = layout if layout.partition_dim != 1 else ranks[0]
        out = torch.zeros(sum(segment.length for segment in layout.segments), dtype=torch.int64)
        shards.cut_bias(layout, lambda part, first, count: parts[part][first : first + count, 0], out)
        assert torch.equal(out, shard(whole_rows, parts)[:, 0])


def test_only_the_slices_of_the_rank_are_read() -> None:
    read: list[tuple[str, int, int, int, int]] = []

    def note(part: str, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        read.append((part, row, rows, column, columns))
        return torch.zeros(rows, columns, dtype=torch.int64)

    qkv = layouts("ColumnParallelLinear", "linear_qkv", 48, 6, Fused(8, 2, 4), 2)[1]
    shards.cut(qkv, note, torch.zeros(24, 6, dtype=torch.int64))
    assert read == [("q", 16, 16, 0, 6), ("k", 4, 4, 0, 6), ("v", 4, 4, 0, 6)]
    read.clear()
    proj = layouts("RowParallelLinear", "linear_proj", 5, 6, Fused(), 3)[2]
    shards.cut(proj, note, torch.zeros(5, 2, dtype=torch.int64))
    assert read == [("whole", 0, 5, 4, 2)]


def test_a_slice_of_another_shape_is_refused() -> None:
    layout = layouts("ColumnParallelLinear", "linear_fc1", 8, 6, Fused(), 1)[0]
    with pytest.raises(RuntimeError):
        shards.cut(layout, lambda *_: torch.zeros(3, 6, dtype=torch.int64), torch.zeros(8, 6, dtype=torch.int64))


def gathered(rank: int, linears: list[list[LinearLayout]]) -> list[dict[str, torch.Tensor]]:
    """The parts of each linear as a rank gathers them."""
    found = []
    for ranks in linears:
        layout = replace(ranks[rank], group=parallel_state.get_tensor_model_parallel_group())
        piece = shard(layout, matrices(layout))
        found.append({part: shards.gather(layout, piece, part, torch.float64) for part, _ in layout.parts})
    return found


def test_every_rank_gathers_the_parts() -> None:
    linears = [
        layouts("ColumnParallelLinear", "linear_qkv", 12, 6, Fused(4, 1, 2), 3),  # fewer query groups than ranks
        layouts("ColumnParallelLinear", "linear_fc1", 12, 5, Fused(), 3),
        layouts("RowParallelLinear", "linear_proj", 5, 6, Fused(), 3),
    ]
    for found in run_ranks(3, gathered, linears, sizes=ParallelSizes(tensor=3)):
        for ranks, parts in zip(linears, found, strict=True):
            for part, whole in matrices(ranks[0]).items():
                assert torch.equal(parts[part], whole.double())
