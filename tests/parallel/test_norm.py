"""The norm is torch's, and says what sequence parallelism needs to know."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from parallel.cpu import megatron_on_cpu
from parallel.norm import SequenceParallelRMSNorm
from parallel.sizes import ParallelSizes
from tests import gpt


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with megatron_on_cpu():
        yield


def config(**changes: Any) -> TransformerConfig:
    return gpt.config_of(ParallelSizes(tensor=2, sequence_parallel=True), **changes)


def test_it_equals_torch_and_the_formula() -> None:
    norm, theirs = SequenceParallelRMSNorm(config(), 6, eps=1e-3), torch.nn.RMSNorm(6, eps=1e-3, dtype=torch.float64)
    weight, x = gpt.values("weight", 6), gpt.values("x", 4, 2, 6)
    with torch.no_grad():
        norm.weight.copy_(weight)
        theirs.weight.copy_(weight)
    ours, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = norm(ours)
    assert torch.equal(y, theirs(their_x))
    assert torch.allclose(y, x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight, rtol=0, atol=1e-14)
    y.square().sum().backward()
    theirs(their_x).square().sum().backward()
    assert (
        ours.grad is not None
        and torch.equal(ours.grad, their_x.grad)
        and torch.equal(norm.weight.grad, theirs.weight.grad)
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_its_weight_says_whether_its_gradient_is_partial(sequence_parallel: bool) -> None:
    norm = SequenceParallelRMSNorm(config(sequence_parallel=sequence_parallel, params_dtype=torch.bfloat16), 6)
    assert norm.weight.sequence_parallel is sequence_parallel
    assert norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"normalization": "LayerNorm"}, {"layernorm_zero_centered_gamma": True}])
def test_another_norm_than_it_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SequenceParallelRMSNorm cannot stand for"):
        SequenceParallelRMSNorm(config(**changes), 6)
