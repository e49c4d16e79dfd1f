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
    exact, plain = _plain(linear, x.detach(), dy, torch.float32), _plain(linear, x.detach(), dy, torch.bfloat16)
    found: dict[str, tuple[float, float]] = {}
    for kind, of in (("y", "y"), ("dx", "dx"), ("dA", "lora_A."), ("dB", "lora_B.")):
        names = [name for name in exact if name.startswith(of)]
        found[kind] = _distance(ours, exact, names), _distance(plain, exact, names)
    return found


def _plain(linear: Any, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Norm, base product, A, B, scale, sum, one operation after another at ``dtype``."""
    adapter = linear.lora.current()
    v = x = x.to(dtype).requires_grad_()
    if getattr(linear, "layer_norm_weight", None) is not None:
        v = torch.nn.functional.rms_norm(x, (x.shape[-1],), linear.layer_norm_weight.detach().to(dtype), linear.eps)
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in adapter.named_parameters()}
    y = v @ linear.weight.detach().to(dtype).T
    for part in adapter.parts:
        term = (v @ parameters[f"lora_A.{part}"].T) @ parameters[f"lora_B.{part}"].T
        y = y.index_add(2, adapter.index(part), term * adapter.scaling[part])
    y.backward(dy.to(dtype))
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def _distance(ours: Named, exact: Named, names: Sequence[str]) -> float:
    off = sum(float((ours[name].float() - exact[name]).square().sum()) for name in names)
    return math.sqrt(off / sum(float(exact[name].square().sum()) for name in names))
