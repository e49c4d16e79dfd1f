"""Norms against their formula and torch's, also where their input is cut over ranks, and what they say of their weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from parallel.cpu import megatron_on_cpu
from parallel.norm import HeadsRMSNorm, KeyRMSNorm, PostNorm, QueryRMSNorm, SequenceParallelRMSNorm
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks

WIDTH, EPS = 4, 1e-3
Floats = npt.NDArray[np.float64]


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


def test_a_zero_centered_weight_is_added_to_one() -> None:
    plain, centered = (
        SequenceParallelRMSNorm(config(layernorm_zero_centered_gamma=centered), 6, eps=EPS)
        for centered in (False, True)
    )
    weight, x = gpt.values("weight", 6), gpt.values("x", 4, 2, 6)
    with torch.no_grad():
        plain.weight.copy_(1 + weight)
        centered.weight.copy_(weight)
    assert torch.equal(centered(x), plain(x))


def test_in_bfloat16_a_zero_centered_norm_rounds_once() -> None:
    """1 + weight would lose the last bits of a small weight."""
    norm = SequenceParallelRMSNorm(config(layernorm_zero_centered_gamma=True, params_dtype=torch.bfloat16), 6, eps=EPS)
    weight, x = gpt.values("weight", 6).bfloat16() / 64, gpt.values("x", 4, 2, 6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(weight)
    exact = torch.nn.functional.rms_norm(x.double(), (6,), 1 + weight.double(), EPS)
    assert torch.equal(norm(x), exact.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_a_post_norm_norms_what_is_added(bias: bool) -> None:
    norm = PostNorm(config())
    size = norm.weight.shape[0]
    weight, x, residual = gpt.values("weight", size), gpt.values("x", 4, 2, size), gpt.values("residual", 4, 2, size)
    shift = gpt.values("bias", size) if bias else None
    with torch.no_grad():
        norm.weight.copy_(weight)
    whole = x if shift is None else x + shift
    expected = residual + torch.nn.functional.rms_norm(whole, (size,), weight, norm.eps)
    assert torch.allclose(norm(True, False)((x, shift), residual, 0.0), expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"PostNorm cannot stand for a hidden_dropout of 0\.1"):
        PostNorm(config(hidden_dropout=0.1))


def heads_norm(rank: int, cls: type[HeadsRMSNorm], heads: int, groups: int, size: int) -> dict[str, Any]:
    """Output and gradients of this rank's heads of values that depend on nothing else."""
    changes = {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": WIDTH}
    norm = cls(gpt.config_of(ParallelSizes(tensor=size), **changes), WIDTH, EPS)
    assert norm.weight.tensor_model_parallel is (size > 1)
    whole = groups if cls is KeyRMSNorm else heads
    first, count = norm.first, norm.weight.shape[0]
    x = gpt.values("x", 3, 2, whole * WIDTH)[..., first : first + count]
    x = x.reshape(3, 2, -1, WIDTH).clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(gpt.values("weight", whole * WIDTH)[first : first + count])
    y = norm(x)
    # Ranks that hold the same key use it for queries of their own.
    (y * gpt.values(f"dy {rank}", *y.shape)).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    held = {"y": y.detach().flatten(2), "dx": x.grad.flatten(2), "dw": norm.weight.grad}
    return {"first": first, **{name: value.numpy() for name, value in held.items()}}


@pytest.mark.parametrize(
    ("cls", "heads", "groups", "size"),
    [
        (QueryRMSNorm, 4, 2, 1), (QueryRMSNorm, 4, 2, 2), (QueryRMSNorm, 6, 6, 3), (QueryRMSNorm, 4, 1, 4),
        (KeyRMSNorm, 4, 2, 1), (KeyRMSNorm, 4, 4, 2), (KeyRMSNorm, 4, 2, 4), (KeyRMSNorm, 4, 1, 4),
    ],
)  # fmt: skip
def test_heads_are_normed_together(cls: type[HeadsRMSNorm], heads: int, groups: int, size: int) -> None:
    ranks = run_ranks(size, heads_norm, cls, heads, groups, size, sizes=ParallelSizes(tensor=size))
    whole = (groups if cls is KeyRMSNorm else heads) * WIDTH
    x, weight = gpt.values("x", 3, 2, whole).requires_grad_(), gpt.values("weight", whole).requires_grad_()
    y = torch.nn.functional.rms_norm(x, (whole,), weight, EPS)
    found = {name: torch.zeros(*shape, whole).double() for name, shape in (("dy", (3, 2)), ("dx", (3, 2)), ("dw", ()))}
    for rank, held in enumerate(ranks):
        part = slice(held["first"], held["first"] + held["y"].shape[-1])
        assert (torch.from_numpy(held["y"]) - y[..., part]).abs().max() < 1e-14
        # Megatron adds up the gradients of a key that several ranks hold.
        count = held["y"].shape[-1] // WIDTH
        found["dy"][..., part] += gpt.values(f"dy {rank}", 3, 2, count, WIDTH).flatten(2)
        for name in ("dx", "dw"):
            found[name][..., part] += torch.from_numpy(held[name])
    (y * found["dy"]).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert (found["dx"] - x.grad).abs().max() < 1e-13
    assert (found["dw"] - weight.grad).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (SequenceParallelRMSNorm, {"normalization": "LayerNorm"}),
        (QueryRMSNorm, {"normalization": "LayerNorm"}),
        (KeyRMSNorm, {"layernorm_zero_centered_gamma": True}),
    ],
)
def test_another_norm_than_it_is_refused(cls: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} cannot stand for"):
        cls(config(**changes), 6)
