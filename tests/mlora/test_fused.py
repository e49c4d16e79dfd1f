"""The fused way's kernels and collectives, in Triton's interpreter on the CPU, against the plain way in float64.

float32 kernels against float64: the tolerance is that of float32 sums.
"""

import copy
from typing import Any

import pytest
import torch

from mlora import fused
from mlora.adapter import LinearAdapter
from mlora.config import LoraConfig
from mlora.dropout import set_micro_batch
from mlora.fused import FusedLinear, FusedMlp, Norm
from mlora.linear import Geometry
from mlora.packed import Packed
from mlora.targets import Projection, Target
from parallel.layout import WHOLE, LinearLayout
from parallel.sizes import ParallelSizes
from tests.mlora.test_branch import own_tokens, replicated_layout
from tests.mlora.test_linear import FC1, FC2, PROJ, QKV, STEP, TOKENS, Case, build, local_input, random, relative
from tests.ranks import run_ranks

TOLERANCE = 2e-5
EPS = 1e-5
LAYOUTS = [ParallelSizes()] + [ParallelSizes(tensor=2, sequence_parallel=sp) for sp in (False, True)]
CASES = [
    Case(QKV, bias=True, dropout=0.3),
    Case(QKV, groups=1, targets=["q_proj", "v_proj"], rank=1),
    Case(QKV, shared_A=True, rank=3),
    Case(QKV, rank_pattern={"k_proj": 2}),
    Case(PROJ, dropout=0.3, bias=True),
    Case(PROJ, rank=2, bias=True),  # in is far larger than out
    Case(FC1, targets=["up_proj"]),
    Case(FC2, rank=7),
    Case(QKV, rank=23),  # 69 ranks together: more than the kernels sum up themselves
    Case(FC1, rank=70, bias=True),  # so many that each half is multiplied alone
    Case(FC1, rank_pattern={"up_proj": 150}, dropout=0.3),
    Case(FC1, targets=["up_proj"], rank=130),
    Case(QKV, groups=6, rank=50),
    Case(FC1, rank=130, dropout=0.3),  # more ranks together than the kernels hold under dropout
]


def float32_copy(module: Any) -> tuple[torch.nn.Parameter, LinearAdapter, Packed]:
    """(weight, adapter, buffers) of an adapted linear, all float32."""
    whole = module.lora.current()
    adapter = copy.deepcopy(whole, {id(whole.layout): whole.layout})
    for parameter in adapter.parameters():
        parameter.data, parameter.grad = parameter.data.float(), None
    adapter.dtype = torch.float32
    weight = torch.nn.Parameter(module.weight.detach().float(), requires_grad=False)
    packed = Packed(weight, adapter, None)
    packed.fill()
    assert packed.is_of(weight)
    torch.testing.assert_close(weight.double(), module.weight.double(), atol=1e-6, rtol=1e-6)
    return weight, adapter, packed


def compare(name: str, ours: Any, theirs: Any) -> dict[str, float]:
    """Relative errors of (y, dx, gradients by parameter name)."""
    (y, dx, gradients), (expected_y, expected_dx, expected) = ours, theirs
    assert gradients.keys() == expected.keys()
    return {
        f"{name} y": relative(y.double(), expected_y),
        f"{name} dx": relative(dx.double(), expected_dx),
        **{f"{name} {key}": relative(gradients[key].double(), expected[key]) for key in expected},
    }


def gradients(adapter: LinearAdapter) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


def geometry(layout: LinearLayout, adapter: LinearAdapter) -> Geometry:
    return Geometry.of(layout, adapter.dropout(TOKENS))


def linear_errors(case: Case, sizes: ParallelSizes, rank: int, normed: bool, name: str) -> dict[str, float]:
    _, module, layout = build(case, sizes)
    module.train()
    x = local_input(case, sizes, layout, rank)
    norm = random("norm", x.shape[-1]).abs() + 0.5
    y, _ = module(torch.nn.functional.rms_norm(x, (x.shape[-1],), norm, EPS) if normed else x)
    dy = random("dy", *y.shape)
    y.backward(dy)
    _, adapter, packed = float32_copy(module)
    small = x.detach().float().requires_grad_()
    bias = module.bias.detach().float() if case.bias else None
    z = FusedLinear.apply(
        small,
        Norm(norm.float(), EPS) if normed else None,
        bias,
        packed,
        geometry(layout, adapter),
        *packed.parameters(),
    )
    z.backward(dy.float())
    found = compare(name, (z, small.grad, gradients(adapter)), (y, x.grad, gradients(module.lora.current())))
    module.lora.active = None
    off, _ = module(torch.nn.functional.rms_norm(x, (x.shape[-1],), norm, EPS) if normed else x)
    x.grad = small.grad = None
    off.backward(dy)
    z = FusedLinear.apply(small, Norm(norm.float(), EPS) if normed else None, bias, packed, Geometry.of(layout, None))
    z.backward(dy.float())
    return found | {f"{name} off": relative(z.double(), off), f"{name} off dx": relative(small.grad.double(), x.grad)}


def mlp_errors(
    sizes: ParallelSizes, rank: int, dropout: float, ranks: tuple[int, int] = (3, 3), **of_fc1: Any
) -> dict[str, float]:
    fc1, fc2 = Case(FC1, rank=ranks[0], dropout=dropout, **of_fc1), Case(FC2, rank=ranks[1], dropout=dropout)
    (_, first, layout1), (_, second, layout2) = build(fc1, sizes), build(fc2, sizes)
    first.train(), second.train()
    x = local_input(fc1, sizes, layout1, rank)
    norm = random("norm", x.shape[-1]).abs() + 0.5
    gate, up = first(torch.nn.functional.rms_norm(x, (x.shape[-1],), norm, EPS))[0].chunk(2, dim=-1)
    y, _ = second(torch.nn.functional.silu(gate) * up)
    dy = random("dy", *y.shape)
    y.backward(dy)
    (_, one, packed1), (_, two, packed2) = float32_copy(first), float32_copy(second)
    small = x.detach().float().requires_grad_()
    geometries = geometry(layout1, one), geometry(layout2, two)
    parameters = [*packed1.parameters(), *packed2.parameters()]
    z = FusedMlp.apply(small, Norm(norm.float(), EPS), (packed1, packed2), geometries, *parameters)
    z.backward(dy.float())
    both = [{f"{i}{k}": g for i, a in enumerate(pair) for k, g in gradients(a).items()} for pair in (
        (one, two), (first.lora.current(), second.lora.current())
    )]  # fmt: skip
    return compare(f"mlp dropout {dropout}, {ranks} ranks {of_fc1}", (z, small.grad, both[0]), (y, x.grad, both[1]))


def replicated_errors(sizes: ParallelSizes, rank: int, normed: bool, dropout: float) -> dict[str, float]:
    """Of a linear that every rank holds whole, from one process that has all tokens."""
    ins, outs, r, name = 24, 40, 3, f"replicated, norm {normed}, dropout {dropout}"
    layout = replicated_layout(sizes, ins, outs)
    weight = torch.nn.Parameter(random("W", outs, ins).float(), requires_grad=False)
    target = Target(Projection(layout.name, WHOLE, "kv_down_proj"), r, 2 * r)
    adapter = LinearAdapter(layout, [target], LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout), weight)
    adapter.train()
    for which, parameter in adapter.named_parameters():
        parameter.data = random(which, *parameter.shape).float()
    x, dy = random("x", TOKENS, 2, ins), random("dy", TOKENS, 2, outs)
    norm, mask = random("norm", ins).abs() + 0.5, adapter.dropout(TOKENS)
    whole = x.clone().requires_grad_()
    factors = [parameter.detach().double().requires_grad_() for parameter in adapter.parameters()]
    A, B = factors
    v = torch.nn.functional.rms_norm(whole, (ins,), norm, EPS) if normed else whole
    y = v @ weight.double().T + (v if mask is None else mask(v)) @ A.T @ B.T * 2
    wanted = [y, *torch.autograd.grad(y, (whole, *factors), dy)]
    packed, mine = Packed(weight, adapter, None), own_tokens(sizes, TOKENS, rank)
    packed.fill()
    piece = x[mine].float().requires_grad_()
    geometry, before = Geometry.of(layout, mask), Norm(norm.float(), EPS) if normed else None
    z = FusedLinear.apply(piece, before, None, packed, geometry, *packed.parameters())
    found = [z, *torch.autograd.grad(z, (piece, *adapter.parameters()), dy[mine].float())]
    if sizes.sequence_parallel:
        for gradient in found[2:]:
            torch.distributed.all_reduce(gradient, group=layout.group)
    wanted[:2] = [tensor[mine] for tensor in wanted[:2]]
    pairs = zip(("y", "dx", "dA", "dB"), found, wanted, strict=True)
    return {f"{name} {key}": relative(ours.double(), theirs) for key, ours, theirs in pairs}


def all_errors(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    set_micro_batch(STEP)
    found = {}
    for normed, dropout in ((False, 0.3), (True, 0.0)):
        found |= replicated_errors(sizes, rank, normed, dropout)
    for dropout in (0.0, 0.3):
        for ranks in ((3, 3), (70, 65), (5, 130)):
            found |= mlp_errors(sizes, rank, dropout, ranks)
    found |= mlp_errors(sizes, rank, 0.0, (5, 3), rank_pattern={"up_proj": 20})
    found |= mlp_errors(sizes, rank, 0.3, (5, 3), targets=["up_proj"])
    for case in CASES:
        for normed in (False, True) if case.name in (QKV, FC1) else (False,):
            found |= linear_errors(case, sizes, rank, normed, f"{case} norm {normed}")
    # At these sizes no product is a wave longer with p columns more: here as if each were.
    fused.adds_a_wave = lambda *sizes: True
    return found | linear_errors(Case(QKV, bias=True, dropout=0.3), sizes, rank, True, "two products for [g | d]")


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_outputs_and_gradients_equal_the_plain_way(sizes: ParallelSizes) -> None:
    for rank, found in enumerate(run_ranks(sizes.tensor, all_errors, sizes, sizes=sizes)):
        worst = max(found, key=lambda name: found[name])
        assert found[worst] < TOLERANCE, (rank, worst, found[worst])


def errors_where_in_is_larger(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    set_micro_batch(STEP)
    return linear_errors(Case(FC1, rank=70, bias=True), sizes, rank, False, "folded")


def test_a_folded_linear_may_have_more_inputs_than_outputs() -> None:
    sizes = ParallelSizes(tensor=4)
    for found in run_ranks(4, errors_where_in_is_larger, sizes, sizes=sizes):
        assert max(found.values()) < TOLERANCE, found


def outputs_of_two_adapters(rank: int) -> dict[str, Any]:
    """One base and two adapters whose tails differ, in turns; and what must be refused."""
    set_micro_batch(STEP)
    (_, module, layout), (_, other, _) = (
        build(Case(QKV, rank=3), ParallelSizes()),
        build(Case(QKV, rank=30), ParallelSizes()),
    )
    weight, narrow, packed = float32_copy(module)
    broad = float32_copy(other)[1]
    x = local_input(Case(QKV), ParallelSizes(), layout, rank).detach().float()

    def run(held: Packed, on: bool = True) -> torch.Tensor:
        if on:
            held.fill()
        parameters = held.parameters() if on else ()
        y: torch.Tensor = FusedLinear.apply(
            x.clone().requires_grad_(), None, None, held, Geometry.of(layout, None), *parameters
        )
        return y

    alone = run(packed).detach()
    wider = Packed.of(weight, broad, packed)
    place, wide_alone = weight.data_ptr(), run(wider).detach()
    again = Packed.of(weight, narrow, wider)
    found = {
        "buffer grows": wider.buffer is not packed.buffer and wider.tail > packed.tail,
        "and is shared": again.buffer is wider.buffer and weight.data_ptr() == place,
        "tables are kept": Packed.of(weight, broad, again) is wider,
        "narrow": torch.equal(run(again), alone),
        "broad": torch.equal(run(wider), wide_alone),
    }
    with torch.no_grad():
        next(iter(broad.lora_B.values())).fill_(torch.nan)
        next(iter(broad.lora_A.values())).fill_(torch.nan)
    found["broad is broken"] = bool(run(wider).isnan().any())
    found["narrow after it"] = torch.equal(run(again), alone)
    run(wider)
    off = run(again, on=False)
    found["off after it"] = not off.isnan().any()
    late = run(again)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="a base weight was changed between forward and backward"):
        late.sum().backward()
    late = run(again)
    again.release(narrow)
    run(wider)
    with pytest.raises(RuntimeError, match="an adapter was deleted between forward and backward"):
        late.sum().backward()
    return found


def test_adapters_share_a_buffer_that_only_grows() -> None:
    (found,) = run_ranks(1, outputs_of_two_adapters)
    assert all(found.values()), found
