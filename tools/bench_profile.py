"""Rows of :mod:`bench_lora` on where a layer's time goes: each kind of GPU kernel, in the frozen layer and the adapted one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

Step = Callable[[int], None]
_STEPS = 8
# What a kernel's name holds -> what it is called in the table; the first that fits.
_KINDS = {
    "nvjet": "matrix products",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "sdpa": "attention",
    "fmha": "attention",
    "flash": "attention",
    "cudnn": "attention",
    "_operand": "ours: v",
    "_dropped_product": "ours: dropped v A",
    "_token_product": "ours: dA, dB alone",
    "_add_low_rank": "ours: dx + d A",
    "_norm_products": "ours: norm backward, dA",
    "_correlation": "ours: norm backward, dA",
    "_norm_gradient": "ours: norm backward, dx",
    "_swiglu_backward": "ours: SwiGLU backward, dA, dB",
    "_pack": "ours: packing",
    "_sums": "ours: sums of dA, dB",
}


def _kind(name: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in name), "other")


def microseconds(step: Step) -> dict[str, float]:
    """Kind of kernel -> µs of a step in which such a kernel runs."""
    for i in range(3):
        step(i)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(_STEPS):
            step(i)
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.events() or ():
        # What torch.compile notes around its kernels has a time, too: theirs again.
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation:
            found[_kind(event.name)] += event.self_device_time_total / _STEPS
    return dict(found)


def profile_rows(steps: dict[str, Step]) -> dict[str, float]:
    """A row for each kind of kernel and step."""
    microseconds(next(iter(steps.values())))  # The profiler's own first work would be counted, too.
    taken = {name: microseconds(step) for name, step in steps.items()}
    kinds = sorted({kind for found in taken.values() for kind in found})
    rows = {f"{kind}, {name}, µs": found.get(kind, 0.0) for kind in kinds for name, found in taken.items()}
    return rows | {f"all kernels, {name}, µs": sum(found.values()) for name, found in taken.items()}
