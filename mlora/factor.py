"""Where one adapter parameter stands in the whole: what checkpoints, exports and counts need."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factor:
    """One rank's piece of a matrix or vector of the adapter.

    A piece may reach beyond the whole, by rows or columns that stand for padding of the vocabulary and are zero.

    Attributes:
        name: global, for example ``decoder.layers.3.self_attention.linear_qkv.q.lora_A``.
        parameter: this rank's piece; of a start that is kept, a buffer.
        shape: of the whole matrix or, for magnitudes, vector.
        offset: of this rank's piece in it.
        replicated: every rank of the tensor-parallel group holds the same piece.
    """

    name: str
    parameter: torch.Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    replicated: bool

    @property
    def inside(self) -> tuple[slice, ...]:
        """The part of ``parameter`` that lies in the whole."""
        places = zip(self.parameter.shape, self.offset, self.shape, strict=True)
        return tuple(slice(max(min(count, size - first), 0)) for count, first, size in places)


def cut(whole: torch.Tensor, dim: int, first: int, count: int) -> torch.Tensor:
    """``count`` rows (``dim`` 0) or columns (1) of a matrix from ``first`` on; zeros beyond its end."""
    at = min(first, whole.shape[dim])
    piece = whole.narrow(dim, at, min(count, whole.shape[dim] - at))
    missing = count - piece.shape[dim]
    return torch.nn.functional.pad(piece, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else piece
