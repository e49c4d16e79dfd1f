"""The layout record against Megatron's own use of the fused rows, on real modules and on every class that it knows by name."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from megatron.core import parallel_state

from parallel import shards
from parallel.layout import LinearLayout, Segment, read_layout
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests import gpt
from tests.parallel.layouts import Fused, any_linear, layouts, linear
from tests.ranks import run_ranks

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.linear_fc1"


def error_of_attention(rank: int, sizes: ParallelSizes, groups: int, gated: bool) -> dict[str, float]:
    """Megatron's q, k, v (and gate) against the products with the parts' own matrices, for this rank's heads."""
    size, width = sizes.tensor, gpt.HIDDEN // gpt.HEADS
    [chunk] = gpt.build(
        sizes,
        num_layers=1,
        num_query_groups=groups,
        attention_output_gate=gated,
        add_qkv_bias=True,
        add_bias_linear=False,
    )
    attention = chunk.decoder.layers[0].self_attention
    x = gpt.values("x", 3, 2, gpt.HIDDEN)
    found = attention.get_query_key_value_tensors(x, None, **({"output_gate": True} if gated else {}))

    def product(part: str, rows: int) -> torch.Tensor:
        bias = gpt.values(f"{QKV}.{part}.bias", rows)
        return (x @ gpt.values(f"{QKV}.{part}", rows, gpt.HIDDEN).T + bias).unflatten(-1, (-1, width))

    q = product("q", gpt.HIDDEN * (2 if gated else 1))
    queries, gates = (q[:, :, 0::2], q[:, :, 1::2]) if gated else (q, None)
    heads = range(rank * gpt.HEADS // size, (rank + 1) * gpt.HEADS // size)
    held = sorted({head * groups // gpt.HEADS for head in heads})
    expected = [
        queries[:, :, heads],
        product("k", groups * width)[:, :, held],
        product("v", groups * width)[:, :, held],
    ]
    if gates is not None:
        expected.append(gates[:, :, heads])
    return {
        name: float((ours - theirs).abs().max())
        for name, ours, theirs in zip("qkvg", found, expected, strict=False)
        if ours.shape == theirs.shape or pytest.fail(f"{name}: {tuple(ours.shape)} against {tuple(theirs.shape)}")
    }


GROUPS = [(1, 4), (2, 4), (4, 4), (2, 8), (4, 2), (4, 1), (2, 1)]
# With fewer groups than ranks, megatron-core 0.16 does not give a rank its own heads of the gate.
ATTENTIONS = [(*case, False) for case in GROUPS] + [(*case, True) for case in GROUPS if case[1] >= case[0]]


@pytest.mark.parametrize(("size", "groups", "gated"), ATTENTIONS)
def test_attention_reads_the_rows_as_the_layout_says(size: int, groups: int, gated: bool) -> None:
    sizes = ParallelSizes(tensor=size)
    for errors in run_ranks(size, error_of_attention, sizes, groups, gated, sizes=sizes):
        assert set(errors) == set("qkvg" if gated else "qkv")
        assert max(errors.values()) < 1e-14, errors


def error_of_mlp(rank: int, sizes: ParallelSizes) -> float:
    [chunk] = gpt.build(sizes, num_layers=1, add_bias_linear=True)
    x = gpt.values("x", 3, 2, gpt.HIDDEN)
    y, bias = chunk.decoder.layers[0].mlp(x)

    def product(part: str) -> torch.Tensor:
        return x @ gpt.values(f"{FC1}.{part}", gpt.FFN, gpt.HIDDEN).T + gpt.values(f"{FC1}.{part}.bias", gpt.FFN)

    down = gpt.values("decoder.layers.0.mlp.linear_fc2.whole", gpt.HIDDEN, gpt.FFN)
    expected = (torch.nn.functional.silu(product("gate")) * product("up")) @ down.T
    assert torch.equal(bias, gpt.values("decoder.layers.0.mlp.linear_fc2.whole.bias", gpt.HIDDEN))
    return float((y - expected).abs().max())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_gated_mlp_reads_the_rows_as_the_layout_says(size: int) -> None:
    sizes = ParallelSizes(tensor=size)
    assert max(run_ranks(size, error_of_mlp, sizes, sizes=sizes)) < 1e-14


def records(rank: int, sizes: ParallelSizes) -> list[tuple[Any, ...]]:
    [chunk] = gpt.build(sizes, num_layers=1)
    found = [layout for name, module in named_modules(chunk) if (layout := read_layout(name, module)) is not None]
    assert all(layout.group is parallel_state.get_tensor_model_parallel_group() for layout in found)
    return [
        (
            layout.name,
            layout.in_features,
            layout.out_features,
            layout.partition_dim,
            layout.sequence_parallel,
            layout.columns,
        )
        for layout in found
    ]


def test_the_records_of_a_model() -> None:
    sizes = ParallelSizes(tensor=2, sequence_parallel=True)
    assert run_ranks(2, records, sizes, sizes=sizes)[1] == [
        ("decoder.layers.0.self_attention.linear_proj", 32, 32, 1, True, (16, 16)),
        ("decoder.layers.0.self_attention.linear_qkv", 32, 64, 0, True, (0, 32)),
        ("decoder.layers.0.mlp.linear_fc1", 32, 96, 0, True, (0, 32)),
        ("decoder.layers.0.mlp.linear_fc2", 48, 32, 1, True, (24, 24)),
        ("output_layer", 32, 64, 0, True, (0, 32)),
    ]


KINDS = [
    ("ColumnParallelLinear", {}, 0),
    ("RowParallelLinear", {}, 1),
    ("TEColumnParallelLinear", {"parallel_mode": "column"}, 0),
    ("TELayerNormColumnParallelLinear", {"parallel_mode": "column"}, 0),
    ("TERowParallelLinear", {"parallel_mode": "row"}, 1),
    ("TELinear", {"parallel_mode": "column"}, 0),
    ("TELinear", {"parallel_mode": "row"}, 1),
    ("TELinear", {"parallel_mode": None}, None),
]


@pytest.mark.parametrize(("kind", "attributes", "dim"), KINDS)
def test_every_class_is_known_by_name(kind: str, attributes: dict[str, Any], dim: int | None) -> None:
    layout = read_layout("x.linear_proj", linear(kind, 6, 10, Fused(), 1, 2, **attributes))
    assert layout is not None and layout.partition_dim == dim
    assert (layout.out_features, layout.in_features) == (12 if dim == 0 else 6, 20 if dim == 1 else 10)
    assert layout.columns == ((10, 10) if dim == 1 else (0, 10))
    assert layout.parts == (("whole", layout.out_features),)
    assert layout.segments == (Segment("whole", 6 if dim == 0 else 0, 6),)


def test_a_subclass_is_what_its_ancestor_is_and_the_group_of_transformer_engine_comes_first() -> None:
    module = linear("TEColumnParallelLinear", 6, 10, Fused(), 1, 2)
    module.__class__ = type("Mine", (type(module),), {})
    module._tp_group, module.tp_group = module.tp_group, None  # type: ignore[assignment]
    layout = read_layout("x.linear_proj", module)
    assert layout is not None and layout.partition_dim == 0 and layout.group.rank() == 1


def test_flags_are_read_from_the_module() -> None:
    module = linear("ColumnParallelLinear", 6, 10, Fused(), 0, 2, sequence_parallel=True, is_expert=True)
    layout = read_layout("x.linear_proj", module)
    assert layout is not None and layout.sequence_parallel and layout.expert


@pytest.mark.parametrize("cut", [False, True])
def test_a_replicated_linear_sees_a_piece_of_the_sequence_if_its_weight_is_marked_so(cut: bool) -> None:
    module = linear("TELinear", 6, 10, Fused(), 0, 2, parallel_mode=None, sequence_parallel=False)
    module.weight.sequence_parallel = cut  # type: ignore[union-attr, assignment]
    layout = read_layout("x.linear_kv_down_proj", module)
    assert layout is not None and layout.sequence_parallel is cut


def test_what_is_no_linear_has_no_record() -> None:
    shared_weight = linear("ColumnParallelLinear", 6, 10, Fused(), 0, 2)
    del shared_weight.weight
    for module in (torch.nn.Linear(2, 2), torch.nn.LayerNorm(3), torch.nn.Module(), shared_weight):
        assert read_layout("x", module) is None


def test_a_linear_without_a_group_is_refused() -> None:
    module = linear("ColumnParallelLinear", 6, 10, Fused(), 0, 2)
    module.tp_group = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="ColumnParallelLinear names no tensor-parallel group"):
        read_layout("x", module)


def test_a_replicated_gated_linear_holds_gate_and_up_whole_on_every_rank() -> None:
    for layout in layouts("TELinear", "mlp.linear_fc1", 12, 4, Fused(), 3):
        assert layout.segments == (Segment("gate", 0, 6), Segment("up", 0, 6))


def test_fewer_query_groups_than_ranks() -> None:
    # One group of 6 heads of width 2: rows q 0-11, k 0-1, v 0-1, four to a rank.
    found = layouts("ColumnParallelLinear", QKV, 16, 8, Fused(6, 1, 2), 4)
    assert [layout.part_rows("q") for layout in found] == [(0, 4), (4, 4), (8, 4), (0, 0)]
    assert [layout.part_rows("k") for layout in found] == [(0, 0), (0, 0), (0, 0), (0, 2)]
    assert found[3].segments == (Segment("k", 0, 2), Segment("v", 0, 2))


def test_rows_that_are_not_contiguous_are_refused_by_name() -> None:
    gated = layouts("ColumnParallelLinear", QKV, 2 * (2 * 8 + 2), 8, Fused(8, 1, 2, attention_output_gate=True), 2)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attention\.linear_qkv: this rank's rows of 'q' are not contiguous"
    ):
        gated[0].part_rows("q")


def test_the_gates_of_a_group_stand_behind_its_queries() -> None:
    # Four heads in two groups, of width 1; q holds for each head its row of q and that of its gate.
    [layout] = layouts("ColumnParallelLinear", QKV, 12, 3, Fused(4, 2, 1, attention_output_gate=True), 1)
    assert [f"{segment.part}{segment.start}" for segment in layout.segments] == [
        "q0", "q2", "q1", "q3", "k0", "v0", "q4", "q6", "q5", "q7", "k1", "v1"
    ]  # fmt: skip
    assert layout.output_index("q").tolist() == [0, 2, 1, 3, 6, 8, 7, 9]
    assert layout.output_index("k").tolist() == [4, 10]


@settings(deadline=None)
@given(any_linear())
def test_every_row_is_on_one_rank_or_on_all(ranks: list[LinearLayout]) -> None:
    copies = 1 if ranks[0].partition_dim == 0 else len(ranks)
    held = [
        (segment.part, row)
        for layout in ranks
        for segment in layout.segments
        for row in range(segment.start, segment.start + segment.length)
    ]
    assert sorted(held) == sorted(
        (part, row) for part, rows in ranks[0].parts for row in range(rows) for _ in range(copies)
    )
    assert sum(rows for _, rows in ranks[0].parts) == ranks[0].out_features
    columns = [column for layout in ranks for column in range(layout.columns[0], sum(layout.columns))]
    copies = 1 if ranks[0].partition_dim == 1 else len(ranks)
    assert sorted(columns) == sorted(list(range(ranks[0].in_features)) * copies)


@settings(deadline=None)
@given(any_linear())
def test_the_output_index_finds_the_rows_of_a_part(ranks: list[LinearLayout]) -> None:
    rows = {part: 1000 * number + torch.arange(count) for number, (part, count) in enumerate(ranks[0].parts)}
    for layout in ranks:
        y = torch.empty(sum(segment.length for segment in layout.segments), dtype=torch.int64)
        shards.cut_bias(layout, lambda part, first, count: rows[part][first : first + count], y)
        for part in rows:
            index = layout.output_index(part)
            assert index.dtype == torch.int64
            if is_contiguous(layout, part):
                first, count = layout.part_rows(part)
                assert torch.equal(y[index], rows[part][first : first + count])
            else:
                assert torch.equal(y[index], y[index].sort().values) and set(y[index].tolist()) <= set(
                    rows[part].tolist()
                )


def is_contiguous(layout: LinearLayout, part: str) -> bool:
    try:
        layout.part_rows(part)
    except ValueError:
        return False
    return True
