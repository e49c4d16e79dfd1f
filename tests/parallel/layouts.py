"""Layouts of linears on any rank of any group, without processes: a module of the named class with the rank's weight."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import assume
from hypothesis import strategies as st

from parallel.layout import LinearLayout, read_layout


@dataclass(frozen=True)
class Fused:
    """The fields of Megatron's configuration that say how linears are fused."""

    num_attention_heads: int = 8
    num_query_groups: int = 4
    kv_channels: int = 4
    gated_linear_unit: bool = True
    attention_output_gate: bool = False


def linear(kind: str, rows: int, columns: int, config: Any, rank: int, size: int, **attributes: Any) -> torch.nn.Module:
    """A module whose class is called ``kind``, as Megatron's and Transformer Engine's are known by name."""
    module = type(kind, (torch.nn.Module,), {})()
    module.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.int64), requires_grad=False)
    module.config = config
    module.tp_group = dist.ProcessGroup(rank, size)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def layouts(kind: str, name: str, out_features: int, in_features: int, config: Any, size: int) -> list[LinearLayout]:
    """The layout of one linear on each rank."""
    rows, columns = out_features, in_features
    if "Row" in kind:
        columns //= size
    elif "Column" in kind:
        rows //= size
    found = [read_layout(name, linear(kind, rows, columns, config, rank, size)) for rank in range(size)]
    return [layout for layout in found if layout is not None]


@st.composite
def any_linear(draw: st.DrawFn) -> list[LinearLayout]:
    """The layouts on all ranks of any linear that Megatron can divide."""
    size = draw(st.integers(1, 6))
    leaf = draw(st.sampled_from(["linear_qkv", "linear_fc1", "linear_proj", "linear_fc2", "linear_q_down_proj"]))
    groups = draw(st.integers(1, 8))
    gated = draw(st.booleans())
    config = Fused(
        num_attention_heads=groups * draw(st.integers(1, 6)),
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 4)),
        gated_linear_unit=draw(st.booleans()),
        attention_output_gate=gated,
    )
    kind = {
        "linear_proj": "RowParallelLinear",
        "linear_fc2": "RowParallelLinear",
        "linear_q_down_proj": "TELinear",
    }.get(leaf, draw(st.sampled_from(["ColumnParallelLinear", "TELayerNormColumnParallelLinear"])))
    in_features = size * draw(st.integers(1, 4))
    out_features = 2 * size * draw(st.integers(1, 4))
    if leaf == "linear_qkv":
        heads = config.num_attention_heads * (2 if gated else 1) + 2 * groups
        out_features = heads * config.kv_channels
        assume(groups % size == 0 or size % groups == 0)
        assume(config.num_attention_heads % size == 0 and out_features % size == 0)
    return layouts(kind, f"decoder.layers.0.{leaf}", out_features, in_features, config, size)
