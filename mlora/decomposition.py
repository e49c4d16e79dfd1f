"""Adapters that start as parts of the base weight: the inits "pissa", "pissa_niter_N" and "olora".

    y = x Wᵀ + σ x (B A - B₀ A₀)ᵀ,   B₀ A₀ a part of W,   A = A₀ and B = B₀ at the start

| init | A₀ | B₀ |
|---|---|---|
| "pissa" (Meng et al. 2024) | √(S/σ) Vᵀ | U √(S/σ), of the r greatest singular values in W = U S Vᵀ |
| "pissa_niter_N" | the same of W's image under N power iterations on r random vectors (Halko et al. 2011, algorithm 4.4) | |
| "olora" (Büyükakyüz 2024) | first r rows of R | first r columns of Q, in W = Q R |

Trained is what those papers train, a part of W with the rest kept still. But where they subtract σ B₀ A₀ from W, it stays whole
here: turned off, the adapter leaves the base as it was, in every dtype; others can be attached beside; and what is trained, merged
and exported is one and the same term, of rank 2r. Checkpoints hold A₀ and B₀, which no other machine need compute alike.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mlora.adapter import LinearAdapter
from mlora.factor import cut
from mlora.initial import normal
from mlora.names import SHARED
from parallel import shards


@torch.no_grad()
def start_from_weight(adapter: LinearAdapter, weight: torch.Tensor) -> None:
    """Fill A, B, A₀ and B₀ of an adapter from its rank's piece of the base weight [out_l, in_l], one projection at a time.

    A collective of the linear's group and of the data-parallel group, of which one rank each decomposes.
    """
    layout, config = adapter.layout, adapter.config
    wide = torch.promote_types(weight.dtype, torch.float32)
    for name, parts in (
        {SHARED: adapter.parts} if adapter.shares_A else {part: [part] for part in adapter.parts}
    ).items():
        rank, scaling = adapter.ranks[parts[0]], adapter.scaling[parts[0]]
        # Without the vocabulary's padding, of which there is more or less.
        whole = torch.cat([shards.gather(layout, weight, part, wide)[: adapter.rows[part]] for part in parts])
        lora_A, lora_B = whole.new_empty(rank, whole.shape[1]), whole.new_empty(whole.shape[0], rank)
        groups = [layout.group, parallel_state.get_data_parallel_group(with_context_parallel=True)]
        if all(group.rank() == 0 for group in groups):
            made = _decompose(
                whole, str(config.init_lora_weights), rank, scaling, f"{config.seed}/{layout.name}.{name}"
            )
            lora_A, lora_B = made[0].contiguous(), made[1].contiguous()
        for group in groups:
            for factor in (lora_A, lora_B):
                dist.broadcast(factor, src=dist.get_global_rank(group, 0), group=group)
        first, count = layout.columns
        adapter.start_A(name, lora_A[:, first : first + count])
        for part, rows in zip(parts, torch.split(lora_B, [adapter.rows[part] for part in parts]), strict=True):
            first, count = layout.part_rows(part)
            if count:
                adapter.start_B(part, cut(rows, 0, first, count))


def check_started(adapters: Iterable[LinearAdapter]) -> None:
    """Raises ValueError for a weight that could not be decomposed."""
    for adapter in adapters:
        for part, value in adapter.lora_A.items():
            if not torch.isfinite(value).all():
                init = adapter.config.init_lora_weights
                raise ValueError(f"{adapter.layout.name}: the weight of {part!r} has no decomposition for {init!r}")


def _decompose(
    whole: torch.Tensor, init: str, rank: int, scaling: float, stream: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A₀ [r, in], B₀ [out, r]) of a weight [out, in]; not finite if there are none."""
    try:
        if init == "olora":
            q, r = torch.linalg.qr(whole)
            return r[:rank], q[:, :rank]
        u, s, vh = _principal(whole, init, rank, stream)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The other ranks wait: they learn it from the values.
        return whole.new_full((rank, whole.shape[1]), torch.nan), whole.new_full((whole.shape[0], rank), torch.nan)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _principal(
    whole: torch.Tensor, init: str, rank: int, stream: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and Vᵀ of the ``rank`` greatest singular values, at least."""
    if init == "pissa":
        return torch.linalg.svd(whole, full_matrices=False)  # type: ignore[no-any-return]
    start = normal(f"{stream}/pissa", whole.shape[1], rank).to(whole)
    q, _ = torch.linalg.qr(whole @ start)
    for _ in range(int(init.removeprefix("pissa_niter_"))):
        q, _ = torch.linalg.qr(whole.T @ q)
        q, _ = torch.linalg.qr(whole @ q)
    u, s, vh = torch.linalg.svd(q.T @ whole, full_matrices=False)
    return q @ u, s, vh
