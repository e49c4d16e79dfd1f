"""Initial adapter weights that do not depend on the layout: drawn whole from (seed, name), then cut.

The bits are those of Philox4x64-10 (Salmon et al. 2011) under a 128-bit key: NumPy keeps that stream for good, and names cannot
come to share a stream, as they could under ``torch.Generator``, which uses no more than 32 bits of a seed.
"""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
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
    bits = _bits(f"{seed}/{name}", rows * columns)
    values = _normal(bits) / rank if kind == "gaussian" else _symmetric(bits) / math.sqrt(columns)
    return torch.from_numpy(values[: rows * columns].astype(np.float32).reshape(rows, columns))


def _bits(stream: str, count: int) -> npt.NDArray[np.uint32]:
    """An even number, at least ``count``, of random 32-bit words that belong to ``stream``."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8").view("<u4")


def _symmetric(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.floating[Any]]:
    """Uniform in (-1, 1): the centres of 2**32 equal intervals."""
    return (bits + 0.5) * 2.0**-31 - 1.0


def _normal(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.floating[Any]]:
    """Standard normal, by pairs (Box and Muller 1958)."""
    first, second = bits.reshape(2, -1) + 0.5
    radius, angle = np.sqrt(-2.0 * np.log(first * 2.0**-32)), second * (2.0**-31 * math.pi)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
