"""Initial adapter weights that do not depend on the layout: drawn whole from (seed, name), then cut."""

import hashlib
import math

import torch


def draw(seed: int, name: str, kind: bool | str, factor: str, rows: int, columns: int, rank: int) -> torch.Tensor:
    """The whole initial matrix [rows, columns] of ``factor`` "A" or "B", float32 on the CPU.

    PEFT's distributions: ``True`` is Kaiming uniform with a = sqrt(5) for A, that is U(-1/sqrt(in), 1/sqrt(in)) over the whole
    input size, and zeros for B; "gaussian" is N(0, 1/r²) for A; ``False`` is torch's ``nn.Linear`` default for both.

    Args:
        seed: of the configuration.
        name: of the parameter, with global layer numbers: every parameter has a stream of its own.
    """
    if factor == "B" and kind is not False:
        return torch.zeros(rows, columns)
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    )
    if kind == "gaussian":
        return torch.randn(rows, columns, generator=generator) / rank
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
