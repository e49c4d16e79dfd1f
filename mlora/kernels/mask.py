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
def _join(low, high):
    return tl.cast(low, tl.uint32) | (tl.cast(high, tl.uint32) << 16)


@triton.jit
def kept(token, column, mask):
    """Which elements of a tile [tokens, columns] are not dropped.

    Tokens count over [s, b], b fastest; ``mask`` is :meth:`Mask.arguments`.
    """
    token0, token1, low0, low1, high0, high1, least0, least1, rows_in_batch, row_length, first_feature, _ = mask
    place = _join(token0, token1) + (token // rows_in_batch + token % rows_in_batch * row_length).to(tl.uint32)
    token_hash = _mix(place ^ _join(low0, low1))
    feature_hash = _mix((first_feature + column).to(tl.uint32) ^ _join(high0, high1))
    x = (token_hash[:, None] ^ feature_hash[None, :]) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B >= _join(least0, least1)


@triton.jit
def keep_scale(mask):
    """What the elements that are kept are multiplied by."""
    return mask[11]


@dataclass(frozen=True)
class Mask:
    """What a kernel needs to compute a mask.

    Attributes:
        first_token: number in the global batch of the first of the [s, b] tokens that the kernel sees.
        key_low, key_high: halves of :class:`mlora.dropout.Dropout`'s key.
        threshold: a hash below it means dropped.
        rows_in_batch: b.
        row_length: tokens from the same place of one row to that of the next.
        first_feature: of the columns among the whole linear's input features.
        keep_scale: 1 / (1 - probability).
    """

    first_token: int
    key_low: int
    key_high: int
    threshold: int
    rows_in_batch: int
    row_length: int
    first_feature: int
    keep_scale: float

    @classmethod
    def of(cls, dropout: Dropout, rows_in_batch: int, first_token: int, first_feature: int) -> "Mask":
        """The mask of a [s, b, features] input, whose first token is ``first_token`` of its sequence."""
        return cls(
            dropout.first_row * dropout.length + first_token,
            dropout.key,
            dropout.key >> 32,
            int(dropout.probability * 2**32),
            rows_in_batch,
            dropout.length,
            first_feature,
            1 / (1 - dropout.probability),
        )

    @classmethod
    def none(cls) -> "Mask":
        """Arguments for a kernel that drops nothing."""
        return cls(0, 0, 0, 0, 1, 1, 0, 1.0)

    def arguments(self) -> tuple[int | float, ...]:
        """What :func:`kept` unpacks.

        What changes from module to module and step to step goes as pairs of 16-bit numbers in floating point: Triton compiles a
        kernel anew for an integer that divides by 16, is 1 or does not fit 31 bits, and would do so for hours.
        """
        changing = (self.first_token, self.key_low, self.key_high, self.threshold)
        halves = (float(value >> shift & 0xFFFF) for value in changing for shift in (0, 16))
        return (*halves, self.rows_in_batch, self.row_length, self.first_feature, self.keep_scale)
