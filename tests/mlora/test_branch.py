"""The low-rank term beside a linear against the term inside it, in float64: outputs and every gradient on every rank."""

import pytest
import torch

from mlora.adapter import LinearAdapter
from mlora.branch import LoraBranch
from mlora.dropout import set_micro_batch
from mlora.linear import Geometry
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
