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


def draw(
    seed: int, name: str, kind: bool | str, factor: str, rows: int, columns: int, rank: int, pair: str = ""
) -> torch.Tensor:
    """The whole initial matrix [rows, columns] of ``factor`` "A" or "B", float32 on the CPU.

    PEFT's distributions: ``True`` is Kaiming uniform with a = sqrt(5) for A, that is U(-1/sqrt(in), 1/sqrt(in)) over the whole
    input size, and zeros for B; "gaussian" is N(0, 1/r²) for A; ``False`` is torch's ``nn.Linear`` default for both. With
    "orthogonal" the rows of A and the columns of B are random combinations of r/2 orthonormal vectors each, orthogonal to the
    other's, so that B A = 0.

    Args:
        seed: of the configuration.
        name: of the parameter, with global layer numbers: every parameter has a stream of its own.
        pair: a name that A and B have in common, for "orthogonal".
    """
    if kind == "orthogonal":
        return _orthogonal(seed, name, factor, rows, columns, rank, pair)
    if factor == "B" and kind is not False:
        return torch.zeros(rows, columns)
    bits = _bits(f"{seed}/{name}", rows * columns)
    values = _normal(bits) / rank if kind == "gaussian" else _symmetric(bits) / math.sqrt(columns)
    return torch.from_numpy(values[: rows * columns].astype(np.float32).reshape(rows, columns))


def normal(stream: str, rows: int, columns: int) -> torch.Tensor:
    """Standard normal numbers that belong to ``stream``, float64 [rows, columns] on the CPU."""
    return torch.from_numpy(_normal(_bits(stream, rows * columns))[: rows * columns].reshape(rows, columns))


def _orthogonal(seed: int, name: str, factor: str, rows: int, columns: int, rank: int, pair: str) -> torch.Tensor:
    basis, _ = torch.linalg.qr(normal(f"{seed}/{pair}/orthogonal", rank, rank))
    vectors, size = (basis[0::2], columns) if factor == "A" else (basis[1::2], rows)
    matrix: torch.Tensor = (normal(f"{seed}/{name}", size, rank // 2) @ vectors / 10).float()
    return matrix.T if factor == "A" else matrix


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
