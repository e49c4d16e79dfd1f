"""Rows of :mod:`bench_lora` for single linears: what the low-rank term costs each, and what rounding makes of its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[int], None]
Named = Mapping[str, torch.Tensor]


def linears(layer: Any) -> dict[str, Any]:
    """The four linears of a decoder layer, by their shapes."""
    found = (
        layer.self_attention.linear_qkv,
        layer.self_attention.linear_proj,
        layer.mlp.linear_fc1,
        layer.mlp.linear_fc2,
    )
    return {f"{linear.weight.shape[1]} -> {linear.weight.shape[0]}": linear for linear in found}


def inputs(linear: Any, tokens: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random bf16 inputs [T, 1, in] that require grad, and output gradients [T, 1, out]."""
    rows, columns = linear.out_features, linear.in_features
    xs = [torch.randn(tokens, 1, columns, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(count)]
    return xs, [torch.randn(tokens, 1, rows, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def linear_step(linear: Any, xs: Sequence[torch.Tensor], dys: Sequence[torch.Tensor]) -> Step:
    """Forward and backward of one linear on input number i."""

    def step(i: int) -> None:
        x = xs[i % len(xs)]
        x.grad = None
        linear(x)[0].backward(dys[i % len(xs)])
        for parameter in linear.parameters():
            parameter.grad = None

    return step


def errors(linear: Any, tokens: int) -> dict[str, tuple[float, float]]:
    """Of y, dx, dA and dB of an adapted linear without bias: the relative error of ours, and of PEFT's order of operations in bf16.

    Both against float32 on the same rounded numbers; an error is the norm of the difference over the norm.
    """
    (x,), (dy,) = inputs(linear, tokens, 1)
    linear(x)[0].backward(dy)
    adapter = linear.lora.current()
    ours = {"dx": x.grad, **{name: parameter.grad for name, parameter in adapter.named_parameters()}}
    ours["y"] = linear(x)[0].detach()
    for parameter in adapter.parameters():
        parameter.grad = None
    exact, theirs = plain(linear, x.detach(), dy, torch.float32), plain(linear, x.detach(), dy, torch.bfloat16)
    found: dict[str, tuple[float, float]] = {}
    for kind, of in (("y", "y"), ("dx", "dx"), ("dA", "lora_A."), ("dB", "lora_B.")):
        names = [name for name in exact if name.startswith(of)]
        found[kind] = _distance(ours, exact, names), _distance(theirs, exact, names)
    return found


def plain(linear: Any, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """y, dx and the parameters' gradients of an adapted linear in torch at ``dtype``, one operation after another, as PEFT does
    it: norm, base product, dropout, A, B, scale, sum. ``x`` [s, b, in] and ``dy`` [s, b, out] of any dtype."""
    adapter = linear.lora.current()
    v = x = x.detach().to(dtype).requires_grad_()
    if getattr(linear, "layer_norm_weight", None) is not None:
        wide = torch.promote_types(dtype, torch.float32)  # As every norm is computed.
        weight = linear.layer_norm_weight.detach().to(wide) + (1 if linear.zero_centered_gamma else 0)
        v = torch.nn.functional.rms_norm(x.to(wide), (x.shape[-1],), weight, linear.eps).to(dtype)
    y = v @ linear.weight.detach().to(dtype).T
    if linear.use_bias:
        y = y + linear.bias.detach().to(dtype)
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in adapter.named_parameters()}
    mask = adapter.dropout(x.shape[0])
    dropped = v if mask is None else mask(v)
    for part in adapter.parts:
        A = parameters[f"lora_A.{'shared' if adapter.shares_A else part}"]
        term = (dropped @ A.T) @ parameters[f"lora_B.{part}"].T * adapter.scaling[part]
        y = y.index_add(2, adapter.index(part), term)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in parameters.items()}}


def _distance(ours: Named, exact: Named, names: Sequence[str]) -> float:
    off = sum(float((ours[name].float() - exact[name]).square().sum()) for name in names)
    return math.sqrt(off / sum(float(exact[name].square().sum()) for name in names))
