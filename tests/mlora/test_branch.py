"""The low-rank term beside a linear against the term inside it, in float64: outputs and every gradient on every rank."""

import pytest
import torch
from megatron.core import parallel_state

from mlora.adapter import LinearAdapter
from mlora.branch import LoraBranch
from mlora.dropout import Dropout, set_micro_batch
from mlora.linear import Geometry
from parallel.layout import WHOLE, LinearLayout, Segment
from parallel.sizes import ParallelSizes
from tests.mlora.test_linear import LAYOUTS, STEP, TOKENS, build, cases, local_input, random, relative
from tests.ranks import run_ranks


def finished(adapter: LinearAdapter) -> dict[str, torch.Tensor]:
    """The gradients after Megatron's finalize step: what is a share of a sum is added up."""
    gradients = {}
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()
        if parameter.sequence_parallel:  # type: ignore[attr-defined]
            torch.distributed.all_reduce(gradients[name], group=adapter.layout.group)
    return gradients


def errors(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    found = {}
    set_micro_batch(STEP)
    for case in cases(sizes.tensor):
        model, module, layout = build(case, sizes)
        bank = module.lora
        adapter = bank.current()
        adapter.train()
        x = local_input(case, sizes, layout, rank)
        y, _ = module(x)
        dy = random("dy", *y.shape)
        y.backward(dy)
        inside = {"dx": x.grad, **finished(adapter)}
        model.zero_grad()
        bank.active = None
        beside = x.detach().requires_grad_()
        term = LoraBranch.apply(beside, *adapter.fused(), Geometry.of(layout, adapter.dropout(TOKENS)))
        z = module(beside)[0] + term
        z.backward(dy)
        found[f"{case} y"] = relative(z, y)
        found[f"{case} dx"] = relative(beside.grad, inside["dx"])
        found |= {f"{case} {name}": relative(gradient, inside[name]) for name, gradient in finished(adapter).items()}
    return found


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_tensor_equals_that_of_the_term_inside(sizes: ParallelSizes) -> None:
    for found in run_ranks(sizes.tensor, errors, sizes, sizes=sizes):
        worst = max(found, key=lambda name: found[name])
        assert found[worst] < 1e-12, (worst, found[worst])


def replicated_layout(sizes: ParallelSizes, ins: int, outs: int) -> LinearLayout:
    """Of a linear that every rank holds whole."""
    return LinearLayout(
        name="linear_kv_down_proj",
        in_features=ins,
        out_features=outs,
        partition_dim=None,
        group=parallel_state.get_tensor_model_parallel_group(),
        sequence_parallel=sizes.sequence_parallel,
        expert=False,
        parts=((WHOLE, outs),),
        segments=(Segment(WHOLE, 0, outs),),
    )


def own_tokens(sizes: ParallelSizes, length: int, rank: int) -> slice:
    """Of the sequence, what such a linear is given."""
    count = length // sizes.tensor
    return slice(rank * count, (rank + 1) * count) if sizes.sequence_parallel else slice(None)


def replicated(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    """Errors of the term beside a linear that every rank holds whole, from that of one process that has all tokens."""
    set_micro_batch(STEP)
    length, rows, ins, outs, r = 12, 2, 6, 10, 3
    A, B = (random(name, *shape).requires_grad_() for name, shape in (("A", (r, ins)), ("B", (outs, r))))
    x, dy = random("x", length, rows, ins), random("dy", length, rows, outs)
    layout = replicated_layout(sizes, ins, outs)
    mask = Dropout.of(0.3, 1, layout.name, length)
    whole = x.clone().requires_grad_()
    y = mask(whole) @ A.T @ B.T
    expected = [y, *torch.autograd.grad(y, (whole, A, B), dy)]
    mine = own_tokens(sizes, length, rank)
    piece = x[mine].clone().requires_grad_()
    z = LoraBranch.apply(piece, A, B, Geometry.of(layout, mask))
    found = [z, *torch.autograd.grad(z, (piece, A, B), dy[mine])]
    if sizes.sequence_parallel:
        for gradient in found[2:]:
            torch.distributed.all_reduce(gradient, group=layout.group)
    wanted = [expected[0][mine], expected[1][mine], *expected[2:]]
    return {
        name: relative(ours, theirs) for name, ours, theirs in zip(("y", "dx", "dA", "dB"), found, wanted, strict=True)
    }


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_beside_a_replicated_linear_each_rank_has_its_own_tokens(sizes: ParallelSizes) -> None:
    for found in run_ranks(sizes.tensor, replicated, sizes, sizes=sizes):
        assert max(found.values()) < 1e-12, found
