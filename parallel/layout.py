"""The layout record of a linear: what this rank holds of it, read from the module and never guessed from shapes.

Sizes, collectives, checkpoint offsets and the order of fused rows are all functions of :class:`LinearLayout`.

Fused linears interleave their parts. With g query groups, q = heads / g and d = kv_channels, the rows of the whole
``linear_qkv`` are, for each group, ``[q·d of q | q·d of the output gate, if any | d of k | d of v]``, and a rank holds one
contiguous piece of that, also when there are fewer groups than ranks. ``linear_fc1`` of a gated MLP holds on each rank that
rank's piece of the gate and then its piece of the up projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

# Class name -> dimension of the weight [out, in] that is cut over the group. Looked up along the class's ancestors, so that
# Transformer Engine's classes are known without importing it. TELinear says in ``parallel_mode`` what it is.
PARTITION_DIM: dict[str, int | None] = {
    "TELayerNormColumnParallelLinear": 0,
    "TEColumnParallelLinear": 0,
    "TERowParallelLinear": 1,
    "ColumnParallelLinear": 0,
    "RowParallelLinear": 1,
    "TELinear": None,
    # One for all experts of a rank, whose weights are weight0, weight1, ...; the record is that of each.
    "TEColumnParallelGroupedLinear": 0,
    "TERowParallelGroupedLinear": 1,
}
_PARALLEL_MODE = {"column": 0, "row": 1}

WHOLE = "whole"


@dataclass(frozen=True)
class Segment:
    """A run of a linear's output rows: ``length`` rows of ``part`` from row ``start`` of that part's own matrix."""

    part: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """What one rank holds of a linear ``y = x Wᵀ``, W [out_features, in_features].

    Attributes:
        name: of the module, with global layer numbers.
        in_features, out_features: of the whole W.
        partition_dim: 0 if the group's ranks hold different rows of W, 1 for different columns, None if each holds it all.
        group: the tensor-parallel group (the expert-tensor-parallel group of an expert linear).
        sequence_parallel: the activations outside are cut along the sequence over ``group``.
        expert: an expert's linear.
        parts: (name, rows) of each part of the whole W: q, k, v; gate, up; or one part "whole".
        segments: this rank's rows of W, in order.
    """

    name: str
    in_features: int
    out_features: int
    partition_dim: int | None
    group: dist.ProcessGroup
    sequence_parallel: bool
    expert: bool
    parts: tuple[tuple[str, int], ...]
    segments: tuple[Segment, ...]

    @property
    def columns(self) -> tuple[int, int]:
        """(first, count) of the columns of W on this rank."""
        if self.partition_dim != 1:
            return 0, self.in_features
        count = self.in_features // self.group.size()
        return self.group.rank() * count, count

    def part_rows(self, part: str) -> tuple[int, int]:
        """(first, count) of the rows of ``part``'s own matrix on this rank; (0, 0) if it holds none.

        Raises:
            ValueError: if they are not contiguous (gated attention with fewer query groups than ranks).
        """
        runs = sorted((s.start, s.length) for s in self.segments if s.part == part)
        if not runs:
            return 0, 0
        first, end = runs[0][0], runs[0][0]
        for start, length in runs:
            if start != end:
                raise ValueError(
                    f"{self.name}: this rank's rows of {part!r} are not contiguous; use a tensor parallel size that divides "
                    f"the number of query groups"
                )
            end = start + length
        return first, end - first

    def output_index(self, part: str) -> torch.Tensor:
        """Where the rows of ``part`` on this rank stand among the rank's output rows, in the order of the part's own rows.

        int64 [count], so that ``y[..., index] == x @ W_part[first : first + count].T``.
        """
        places: list[tuple[int, int, int]] = []
        at = 0
        for segment in self.segments:
            if segment.part == part:
                places.append((segment.start, at, segment.length))
            at += segment.length
        runs = [torch.arange(at, at + length) for _, at, length in sorted(places)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)


def read_layout(name: str, module: torch.nn.Module) -> LinearLayout | None:
    """The layout of ``module``, or None if it is not a linear of Megatron's.

    Args:
        name: the module's name with global layer numbers; its last part (``linear_qkv``, ``linear_fc1``) says what is fused.
        module: a linear of Megatron's local or Transformer Engine spec, with its weight.
    """
    kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in PARTITION_DIM), None)
    weight = getattr(module, "weight", getattr(module, "weight0", None))
    if kind is None or not isinstance(weight, torch.Tensor):
        return None
    dim = _PARALLEL_MODE.get(str(getattr(module, "parallel_mode", None))) if kind == "TELinear" else PARTITION_DIM[kind]
    group = _group(module)
    size = group.size()
    rows, columns = weight.shape
    out_features, in_features = rows * (size if dim == 0 else 1), columns * (size if dim == 1 else 1)
    runs = list(fused_rows(name, module.config, out_features, size if dim == 0 else 1))
    piece = (group.rank() * rows, rows) if dim == 0 else (0, rows)
    # To Transformer Engine a replicated linear is one of a group of one, without sequence parallelism; what tokens it is given
    # is told by Megatron's mark on its weight.
    marked = weight if dim is None else module
    totals: dict[str, int] = {}
    for run in runs:
        totals[run.part] = totals.get(run.part, 0) + run.length
    return LinearLayout(
        name=name,
        in_features=in_features,
        out_features=out_features,
        partition_dim=dim,
        group=group,
        sequence_parallel=bool(getattr(marked, "sequence_parallel", False)),
        expert=bool(getattr(module, "is_expert", False)) or kind.endswith("GroupedLinear"),
        parts=tuple(totals.items()),
        segments=tuple(_within(runs, *piece)),
    )


def _group(module: torch.nn.Module) -> dist.ProcessGroup:
    for attribute in ("_tp_group", "tp_group"):
        group = getattr(module, attribute, None)
        if isinstance(group, dist.ProcessGroup):
            return group
    raise ValueError(f"{type(module).__name__} names no tensor-parallel group")


def fused_rows(name: str, config: "TransformerConfig", out_features: int, size: int) -> Iterator[Segment]:
    """The rows of a whole linear as the pieces of the ``size`` ranks that share them, in order of rank.

    Args:
        name: of the module.
        config: of the model.
        out_features: rows of the whole weight.
    """
    leaf = name.rpartition(".")[2]
    if leaf == "linear_qkv":
        yield from _qkv_rows(config)
    elif leaf == "linear_fc1" and config.gated_linear_unit:
        length = out_features // 2 // size
        for rank in range(size):
            yield Segment("gate", rank * length, length)
            yield Segment("up", rank * length, length)
    else:
        yield Segment(WHOLE, 0, out_features)


def _qkv_rows(config: "TransformerConfig") -> Iterator[Segment]:
    groups, heads, width = config.num_query_groups, config.num_attention_heads, config.kv_channels
    assert groups is not None and width is not None
    per_group = heads // groups
    gated = getattr(config, "attention_output_gate", False)
    for group in range(groups):
        if gated:
            # The part q holds, head by head, the head's rows of q and then of its gate; Megatron puts a group's gates last.
            for offset in (0, width):
                for head in range(group * per_group, (group + 1) * per_group):
                    yield Segment("q", head * 2 * width + offset, width)
        else:
            yield Segment("q", group * per_group * width, per_group * width)
        yield Segment("k", group * width, width)
        yield Segment("v", group * width, width)


def _within(runs: list[Segment], first: int, count: int) -> Iterator[Segment]:
    """The pieces of consecutive ``runs`` that fall into rows [first, first + count)."""
    at = 0
    for run in runs:
        start, end = max(first, at), min(first + count, at + run.length)
        if start < end:
            yield Segment(run.part, run.start + start - at, end - start)
        at += run.length
