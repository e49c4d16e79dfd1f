"""The dropout mask of :mod:`mlora.dropout` inside a kernel: the same integers, computed where they are needed."""

from dataclasses import dataclass

import triton
import triton.language as tl

from mlora.dropout import Dropout


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropped(v, token, column, mask):
    """A tile v [tokens, columns] with its dropped elements at zero and the others scaled, float32.

    Tokens count over [s, b], b fastest; ``mask`` is :meth:`Mask.arguments`.
    """
    first_token, rows_in_batch, row_length, first_row, key_low, key_high, threshold, keep_scale, first_feature = mask
    position = first_token + token // rows_in_batch
    row = first_row + token % rows_in_batch
    token_hash = _mix((row * row_length + position).to(tl.uint32) ^ key_low.to(tl.uint32))
    feature_hash = _mix((first_feature + column).to(tl.uint32) ^ key_high.to(tl.uint32))
    kept = _mix(token_hash[:, None] ^ feature_hash[None, :]) >= threshold.to(tl.uint32)
    return tl.where(kept, v.to(tl.float32) * keep_scale, 0.0)


@dataclass(frozen=True)
class Mask:
    """What a kernel needs to compute a mask.

    Attributes:
        first_token: position in the sequence of the first of the [s, b] tokens that the kernel sees.
        rows_in_batch: b.
        row_length, first_row, key_low, key_high: of :class:`mlora.dropout.Dropout`.
        threshold: a hash below it means dropped.
        keep_scale: 1 / (1 - probability).
        first_feature: of the columns among the whole linear's input features.
    """

    first_token: int
    rows_in_batch: int
    row_length: int
    first_row: int
    key_low: int
    key_high: int
    threshold: int
    keep_scale: float
    first_feature: int

    @classmethod
    def of(cls, dropout: Dropout, rows_in_batch: int, first_token: int, first_feature: int) -> "Mask":
        """The mask of a [s, b, features] input."""
        return cls(
            first_token,
            rows_in_batch,
            dropout.length,
            dropout.first_row,
            dropout.key & 0xFFFFFFFF,
            dropout.key >> 32,
            int(dropout.probability * 2**32),
            1 / (1 - dropout.probability),
            first_feature,
        )

    @classmethod
    def none(cls) -> "Mask":
        """Arguments for a kernel that drops nothing."""
        return cls(0, 1, 1, 0, 0, 0, 0, 1.0, 0)

    def arguments(self) -> tuple[int | float, ...]:
        """What :func:`dropped` unpacks."""
        return (
            self.first_token,
            self.rows_in_batch,
            self.row_length,
            self.first_row,
            self.key_low,
            self.key_high,
            self.threshold,
            self.keep_scale,
            self.first_feature,
        )
