"""Cutting a linear's parts into this rank's fused weight, and joining it back: the one place of the interleaving."""

from collections.abc import Callable

import torch

from parallel import collectives
from parallel.layout import LinearLayout

# (part, first row, row count, first column, column count) -> that slice of the part's own matrix [rows, columns]
ReadSlice = Callable[[str, int, int, int, int], torch.Tensor]


def cut(layout: LinearLayout, read: ReadSlice, out: torch.Tensor) -> None:
    """Fill this rank's ``out`` [rows, columns] from the parts' matrices, reading only the slices that it holds."""
    first, count = layout.columns
    at = 0
    for segment in layout.segments:
        out[at : at + segment.length].copy_(read(segment.part, segment.start, segment.length, first, count))
        at += segment.length


def cut_bias(layout: LinearLayout, read: Callable[[str, int, int], torch.Tensor], out: torch.Tensor) -> None:
    """Fill this rank's bias ``out`` [rows] from the parts' biases; ``read(part, first, count)`` gives a slice."""
    at = 0
    for segment in layout.segments:
        out[at : at + segment.length].copy_(read(segment.part, segment.start, segment.length))
        at += segment.length


def join(layouts: list[LinearLayout], shards: list[torch.Tensor], part: str) -> torch.Tensor:
    """The whole matrix of ``part`` from all ranks' fused weights, in order of rank."""
    rows = dict(layouts[0].parts)[part]
    whole = shards[0].new_empty(rows, layouts[0].in_features)
    for layout, shard in zip(layouts, shards, strict=True):
        _put(layout, shard, part, whole)
    return whole


def gather(layout: LinearLayout, shard: torch.Tensor, part: str, dtype: torch.dtype) -> torch.Tensor:
    """The whole matrix of ``part`` on every rank, from this rank's fused weight. A collective of the linear's group."""
    whole = shard.new_zeros(dict(layout.parts)[part], layout.in_features, dtype=dtype)
    _put(layout, shard, part, whole)
    return whole if layout.partition_dim is None else collectives.all_reduce_(whole, layout.group)


def _put(layout: LinearLayout, shard: torch.Tensor, part: str, whole: torch.Tensor) -> None:
    first, count = layout.columns
    at = 0
    for segment in layout.segments:
        if segment.part == part:
            target = whole[segment.start : segment.start + segment.length, first : first + count]
            target.copy_(shard[at : at + segment.length])
        at += segment.length
